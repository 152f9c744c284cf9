"""The templates of the demo's arithmetic word problems, and the words that fill them."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One kind of word problem.

    `steps` holds one or two operations, such as `("a x b", "p + c")`, where p is the result of the step before;
    `limits` the smallest and largest value of each number in the story. In `story` and `work`, `{a}` to `{c}` are the
    numbers, `{eq}` and `{eq2}` the worked equations; every other field is a word from `scene`.
    """

    subset: str
    steps: tuple[str, ...]
    limits: dict[str, tuple[int, int]]
    story: str
    work: str


# Three lines a problem: `subset | steps | limits`, the story, the worked answer. All numbers and results are at least
# 2, so that every counted noun is a plural.
_TABLE = """
addition | a + b | a=2-99 b=2-60
    {N} has {a} {things} and gets {b} more. How many {things} does {N} have now?
    Now {N} has {eq} {things}.
addition | a + b | a=2-80 b=2-80
    {N} has {a} {things} and {M} has {b}. How many {things} do they have together?
    Together they have {eq} {things}.
addition | a + b | a=2-60 b=2-60
    There are {a} red {beads} and {b} blue {beads} in a {box}. How many {beads} are in the {box}?
    The {box} holds {eq} {beads}.
addition | a + b | a=5-70 b=5-70
    {N} read {a} pages on {day} and {b} pages on {day2}. How many pages did {they} read on the two days?
    {N} read {eq} pages.
addition | a + b | a=3-45 b=2-30
    A bus carries {a} people. At the next stop {b} more get on and nobody gets off. How many people are on it?
    The bus carries {eq} people.
addition | a + b | a=3-90 b=3-90
    {N} pays {a} dollars for a {toy} and {b} dollars for a {toy2}. How many dollars does {they} pay?
    {N} pays {eq} dollars.
addition | a + b | a=2-50 b=2-70
    After giving {a} {things} to {M}, {N} has {b} left. How many {things} did {N} have at first?
    At first {N} had {eq} {things}.
addition | a + b | a=4-99 b=4-99
    {N} walks {a} meters to the {place} and then {b} meters to the {place2}. How many meters is that?
    {N} walks {eq} meters.
addition | a + b | a=2-80 b=2-40
    {M} has {a} {things}. {N} has {b} more than {M}. How many {things} does {N} have?
    {N} has {eq} {things}.
subtraction | a - b | a=5-99 b=2-90
    {N} has {a} {things} and gives {b} of them to {M}. How many {things} does {N} have left?
    {N} has {eq} {things} left.
subtraction | a - b | a=5-99 b=2-90
    {N} has {a} {things} and {M} has {b}. How many more {things} does {N} have than {M}?
    {N} has {eq} more {things}.
subtraction | a - b | a=20-99 b=5-90
    A book has {a} pages. {N} has read {b} of them. How many pages are left?
    There are {eq} pages left.
subtraction | a - b | a=8-80 b=2-70
    There are {a} children at the {place}. Then {b} of them go home. How many children stay?
    {eq} children stay.
subtraction | a - b | a=8-99 b=3-90
    A {toy} costs {a} dollars. {N} has {b} dollars. How many more dollars does {N} need?
    {N} needs {eq} more dollars.
subtraction | a - b | a=6-80 b=2-70
    A {box} holds {a} {beads}. {b} of them are red and the others are blue. How many {beads} are blue?
    {eq} {beads} are blue.
subtraction | a - b | a=5-90 b=2-60
    {N} finds {b} {things} and now has {a}. How many {things} did {they} have before?
    Before, {N} had {eq} {things}.
subtraction | a - b | a=12-80 b=2-60
    {N} is {a} years old and {M} is {b}. How many years older is {N}?
    {N} is {eq} years older.
subtraction | a - b | a=6-90 b=2-60
    {N} has {a} {things}, which is {b} more than {M} has. How many {things} does {M} have?
    {M} has {eq} {things}.
multiplication | a x b | a=2-12 b=2-20
    {N} has {a} {boxes} with {b} {things} in each. How many {things} does {N} have?
    {N} has {eq} {things}.
multiplication | a x b | a=3-25 b=2-12
    A {toy} costs {a} dollars. How many dollars do {b} {toys} cost?
    They cost {eq} dollars.
multiplication | a x b | a=4-25 b=2-12
    {N} reads {a} pages every day. How many pages does {they} read in {b} days?
    {N} reads {eq} pages.
multiplication | a x b | a=3-15 b=4-20
    A hall has {a} rows of {b} seats. How many seats does the hall have?
    The hall has {eq} seats.
multiplication | a x b | a=2-12 b=3-20
    {N} plants {a} rows of flowers with {b} flowers in each row. How many flowers does {they} plant?
    {N} plants {eq} flowers.
multiplication | a x b | a=3-20 b=2-12
    Each of {a} children brings {b} {things}. How many {things} do the children bring?
    The children bring {eq} {things}.
multiplication | a x b | a=6-25 b=2-12
    {N} earns {a} dollars an hour. How many dollars does {they} earn in {b} hours?
    {N} earns {eq} dollars.
multiplication | a x b | a=2-25 b=2-9
    {M} has {a} {things}. {N} has {b} times as many. How many {things} does {N} have?
    {N} has {eq} {things}.
multiplication | a x b | a=8-30 b=2-9
    {N} rides {a} miles an hour. How many miles does {they} ride in {b} hours?
    {N} rides {eq} miles.
division | a / b | a=6-144 b=2-12
    {N} shares {a} {things} equally among {b} friends. How many {things} does each friend get?
    Each friend gets {eq} {things}.
division | a / b | a=6-144 b=2-12
    {N} puts {a} {things} into {boxes}, {b} in each. How many {boxes} does {they} fill?
    {N} fills {eq} {boxes}.
division | a / b | a=8-99 b=2-12
    At the {place}, {a} children form {b} equal teams. How many children are in each team?
    Each team has {eq} children.
division | a / b | a=8-144 b=2-12
    {N} pays {a} dollars for {b} {toys} of the same price. How many dollars does one {toy} cost?
    One {toy} costs {eq} dollars.
division | a / b | a=20-160 b=4-20
    A book has {a} pages. {N} reads {b} pages every day. How many days does {they} need for the book?
    {N} needs {eq} days.
division | a / b | a=8-120 b=2-15
    {a} guests sit at {b} tables, the same number at each. How many guests sit at one table?
    At one table sit {eq} guests.
division | a / b | a=8-120 b=2-12
    {N} cuts a rope of {a} meters into {b} equal pieces. How many meters long is each piece?
    Each piece is {eq} meters long.
division | a / b | a=8-120 b=2-9
    {N} has {a} {things}, {b} times as many as {M}. How many {things} does {M} have?
    {M} has {eq} {things}.
two_step | a x b; p + c | a=2-9 b=2-12 c=2-30
    {N} has {a} {boxes} with {b} {things} each and {c} loose {things}. How many {things} does {N} have?
    The {boxes} hold {eq} {things}. With the loose ones {N} has {eq2}.
two_step | a x b; p - c | a=2-9 b=2-12 c=2-30
    {N} buys {a} {boxes} of {b} {things} and gives {c} {things} to {M}. How many {things} are left?
    {N} buys {eq} {things}. Then {eq2} are left.
two_step | a + b; p - c | a=3-50 b=2-40 c=2-60
    {N} has {a} {things}, gets {b} more and then loses {c}. How many {things} does {N} have now?
    First {N} has {eq} {things}, then {eq2}.
two_step | a - b; p - c | a=10-90 b=2-40 c=2-40
    Of {a} {things}, {N} gives {b} to {M} and {c} to {L}. How many {things} does {N} keep?
    After {M}, {N} has {eq} {things}. After {L}, {N} has {eq2}.
two_step | a + b; p / c | a=3-50 b=3-50 c=2-10
    {N} has {a} {things} and {M} has {b}. They fill {c} {boxes} equally with all of them. How many are in each {box}?
    They have {eq} {things}. Each {box} holds {eq2}.
two_step | a - b; p / c | a=10-90 b=2-40 c=2-9
    {N} has {a} {things}, keeps {b} and shares the others equally among {c} friends. How many does each get?
    {N} shares {eq} {things}. Each friend gets {eq2}.
two_step | a / b; p + c | a=6-90 b=2-9 c=2-30
    {N} shares {a} {things} equally among {b} friends. One of them, {M}, already had {c}. How many does {M} have now?
    Each friend gets {eq} {things}. {M} has {eq2}.
two_step | a x b; c - p | a=2-9 b=2-12 c=20-100
    {N} buys {a} {toys} at {b} dollars each and pays with {c} dollars. How many dollars does {they} get back?
    The {toys} cost {eq} dollars. {N} gets back {eq2} dollars.
two_step | a + b; p x c | a=2-12 b=2-12 c=2-9
    Every day {N} walks {a} miles in the morning and {b} in the evening. How many miles is that in {c} days?
    A day has {eq} miles. In {c} days {N} walks {eq2} miles.
two_step | a x b; p / c | a=2-12 b=2-20 c=2-12
    {N} shares {a} {boxes} of {b} {things} equally among {c} children. How many {things} does each child get?
    There are {eq} {things}. Each child gets {eq2}.
two_step | a + b; p + c | a=2-40 b=2-40 c=2-40
    {N} collects {a} {things} on {day}, {b} on {day2} and {c} on {day3}. How many {things} does {they} collect?
    On the first two days {N} collects {eq} {things}. In all that is {eq2}.
two_step | a - b; p + c | a=8-45 b=2-30 c=2-30
    A bus carries {a} people. {b} people get off and {c} people get on. How many people are on the bus now?
    First {eq} people stay. Then there are {eq2}.
"""


def _parse(table: str) -> tuple[Problem, ...]:
    lines = table.strip().splitlines()
    problems = []
    for head, story, work in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        subset, steps, spans = head.split(" | ")
        limits = {}
        for span in spans.split():
            name, low, high = span.replace("=", "-").split("-")
            limits[name] = (int(low), int(high))
        problems.append(Problem(subset, tuple(steps.split("; ")), limits, story.strip(), work.strip()))
    return tuple(problems)


PROBLEMS = _parse(_TABLE)

SUBSETS = tuple(dict.fromkeys(problem.subset for problem in PROBLEMS))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_WOMEN = _words(
    "Anna Bella Carla Dina Emma Fiona Grace Hanna Ida Julia Karin Lena Maria Nina Olga Paula Rosa Sara Tina Wendy"
)
_MEN = _words(
    "Adam Boris Carl David Emil Frank George Hugo Ivan Jack Kevin Leo Mark Noah Oscar Peter Robert Sam Tom Victor"
)
_NAMES = tuple((name, "she") for name in _WOMEN) + tuple((name, "he") for name in _MEN)
_THINGS = _words(
    "apples pears plums lemons nuts eggs cookies muffins stickers stamps coins shells stones cards pencils books roses"
    " tulips candles buttons marbles tickets photos toys"
)
_BEADS = _words("beads marbles balloons buttons pens ribbons blocks socks cups balls")
_BOXES = (("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("jar", "jars"), ("crate", "crates"))
_TOYS = tuple((toy, toy + "s") for toy in _words("kite puzzle lamp mug hat ball belt cake tent drum vase scooter"))
_PLACES = _words("park library market school station beach museum bakery lake playground")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def scene(rng: random.Random) -> dict[str, str]:
    """Words for one story: three people (N, M, L), things, a container, two priced objects, two places, three days."""
    (name, they), (other, _), (third, _) = rng.sample(_NAMES, 3)
    (toy, toys), (toy2, _) = rng.sample(_TOYS, 2)
    box, boxes = rng.choice(_BOXES)
    place, place2 = rng.sample(_PLACES, 2)
    first = rng.randrange(len(_DAYS) - 2)
    words = {
        "N": name,
        "M": other,
        "L": third,
        "they": they,
        "things": rng.choice(_THINGS),
        "beads": rng.choice(_BEADS),
    }
    words |= {"box": box, "boxes": boxes, "toy": toy, "toys": toys, "toy2": toy2, "place": place, "place2": place2}
    return words | dict(zip(("day", "day2", "day3"), _DAYS[first : first + 3], strict=True))
