"""The embedded example: two small tasks on data that multisbora makes itself."""
