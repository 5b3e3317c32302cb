"""Words of the mini world: a subset of GenEval's objects, its ten colours, numbers and relations.

Spelling rules (article, plural) are GenEval's own, oddities included ("knifes", "scissorses").
Source: GenEval (Ghosh et al. 2023, arXiv 2310.11513), djghosh13/geneval, MIT.
"""

from gvu.errors import GvuError

OBJECTS: tuple[str, ...] = (
    "apple", "banana", "carrot", "pizza", "donut", "cake", "car", "bus", "boat", "airplane", "bicycle", "cat",
    "bird", "umbrella", "clock", "cup", "wine glass", "book", "chair", "bed", "tv", "kite", "scissors", "stop sign",
)  # fmt: skip
"""The 24 of GenEval's 80 object names that the renderer can draw."""

COLORS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
"""GenEval's ten colours in GenEval's order."""

NUMBERS: tuple[str, ...] = ("one", "two", "three", "four", "five", "six", "seven")
"""Number words; NUMBERS[n - 1] is the word for n."""

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
"""GenEval's position relations."""

OPPOSITE: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""The relation that holds with the two objects exchanged."""

REGIONS: tuple[tuple[str, str], ...] = (("left", "right"), ("above", "below"))
"""GenEval++'s pairs of image halves, in the order in which its prompts name them."""

SIZES: tuple[str, str] = ("larger", "smaller")
"""GenEval++'s two sizes, in the order in which its prompts name them."""


def article(phrase: str) -> str:
    """`phrase` behind "a" or "an", chosen by its first letter (GenEval's rule: "an umbrella", "an orange car")."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    """GenEval's plural: +"es" after an s, else +"s"; no exceptions."""
    return name + ("es" if name.endswith("s") else "s")


def number(count: int) -> str:
    """The word for a count of 1 to 7.

    Raises:
        GvuError: the count has no word here.
    """
    if not 1 <= count <= len(NUMBERS):
        raise GvuError(f"no number word for {count}: counts run from 1 to {len(NUMBERS)}")
    return NUMBERS[count - 1]
