"""Short fables from a small grammar: the text that train.py trains on.

    python examples/demo/text.py > fables.txt

A fable is an opening, one of the plots, and a moral. Each step is a choice between a few sentences with gaps for two
characters, a place, the weather, a thing and numbers. Who somebody is (name, nature, home, food) is the same in all
fables, and a fable keeps to its names, its thing and its sums. The same seed gives the same fables.
"""

import random
import string
import sys
from dataclasses import dataclass

COUNT, SEED = 1200, 1234
LONGEST = 252  # bytes; with `<s>`, the blank line and `</s>` the 256 positions of the model


@dataclass(frozen=True)
class Person:
    """One animal or human; the properties are the ways to speak of them."""

    kind: str
    trait: str
    home: str
    food: str
    name: str
    he: str

    @property
    def him(self) -> str:
        return {"he": "him", "she": "her"}[self.he]

    @property
    def his(self) -> str:
        return {"he": "his", "she": "her"}[self.he]

    @property
    def his_own(self) -> str:
        return {"he": "his", "she": "hers"}[self.he]

    @property
    def a(self) -> str:
        return with_article(self.kind)

    @property
    def a_trait(self) -> str:
        return with_article(f"{self.trait} {self.kind}")


@dataclass(frozen=True)
class Place:
    at: str
    to: str


@dataclass(frozen=True)
class Weather:
    adjective: str
    sky: str
    later: str


@dataclass(frozen=True)
class Thing:
    adjective: str
    noun: str

    @property
    def a(self) -> str:
        return with_article(f"{self.adjective} {self.noun}")


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# kind, nature, home, food, a name for him, a name for her
KINDS = (
    ("fox", "clever", "a den under the oak", "grapes", "Rufus", "Vera"),
    ("hare", "quick", "a hollow in the field", "clover", "Jasper", "Lettie"),
    ("tortoise", "patient", "a hole by the wall", "lettuce", "Tobias", "Martha"),
    ("bear", "strong", "a cave in the hills", "honey", "Bruno", "Ursa"),
    ("wolf", "fierce", "the dark forest", "mutton", "Grim", "Zelda"),
    ("owl", "wise", "the church tower", "moths", "Oswald", "Olive"),
    ("mouse", "tiny", "a hole in the barn", "cheese", "Pip", "Minna"),
    ("crow", "proud", "the tall elm", "crumbs", "Corbin", "Nell"),
    ("donkey", "stubborn", "the miller's stable", "thistles", "Barnaby", "Jenny"),
    ("goat", "bold", "a shed on the hill", "ivy", "Conrad", "Heidi"),
    ("sheep", "gentle", "the green meadow", "grass", "Walter", "Dolly"),
    ("hedgehog", "shy", "a heap of leaves", "beetles", "Hugo", "Tilly"),
    ("squirrel", "careful", "the walnut tree", "nuts", "Felix", "Hazel"),
    ("frog", "merry", "the mill pond", "flies", "Fergus", "Lily"),
    ("cat", "lazy", "the baker's kitchen", "cream", "Tom", "Ada"),
    ("dog", "loyal", "the farm yard", "bones", "Argus", "Bess"),
    ("badger", "gruff", "a deep burrow", "roots", "Bertram", "Maud"),
    ("otter", "playful", "a burrow by the river", "fish", "Oliver", "Coral"),
    ("goose", "vain", "a house on the green", "barley", "Gustav", "Greta"),
    ("mole", "quiet", "a tunnel under the garden", "worms", "Morris", "Agnes"),
    ("miller", "honest", "the old mill", "bread", "Peter", "Anna"),
    ("tailor", "curious", "a house with a blue door", "pies", "Simon", "Clara"),
    ("farmer", "thrifty", "a cottage by the lane", "apples", "Henry", "Edith"),
    ("shepherd", "sleepy", "a hut on the hill", "pancakes", "David", "Rose"),
)
PERSONS = [(Person(*words, him, "he"), Person(*words, her, "she")) for *words, him, her in KINDS]

PLACES = tuple(
    Place(f"{near} {what}", f"to {what}")
    for near, what in (
        ("by", "the river"),
        ("on", "the old bridge"),
        ("at", "the market"),
        ("in", "the orchard"),
        ("at", "the crossroads"),
        ("by", "the lake"),
        ("beside", "the well"),
        ("on", "the high hill"),
        ("near", "the village"),
        ("in", "the birch wood"),
    )
)
WEATHERS = (
    Weather("rainy", "the rain fell without end", "the rain had stopped"),
    Weather("windy", "the wind shook the trees", "the wind had gone to sleep"),
    Weather("snowy", "the snow lay deep on the road", "the snow had melted"),
    Weather("foggy", "nobody could see the road", "the fog had lifted"),
    Weather("sunny", "the sun shone on the roofs", "the sun had set"),
    Weather("frosty", "the puddles were hard as stone", "the ice had turned to water"),
    Weather("stormy", "thunder rolled over the hills", "the storm had passed"),
)
TIMES = ("morning", "afternoon", "evening", "day")
THINGS = tuple(
    Thing(adjective, noun)
    for adjective, noun in (
        ("silver", "bell"),
        ("red", "hat"),
        ("copper", "key"),
        ("warm", "blanket"),
        ("wooden", "spoon"),
        ("green", "lantern"),
        ("long", "rope"),
        ("little", "drum"),
        ("brass", "button"),
        ("old", "umbrella"),
    )
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FRUITS = ("apples", "pears", "plums", "nuts", "cakes", "eggs")

# A plot is a row of beats, a beat a choice of sentences. In the gaps: a and b the characters, p and q places, w the
# weather, t the thing, f the fruit, time the time of day, and the numbers n = k + m. What stands in `{...!c}` is
# capitalised.
OPENING = (
    "The {a.kind} {a.name} lived in {a.home}.",
    "The {a.trait} {a.kind} {a.name} loved {a.food}.",
    "The {a.kind} {a.name} went {p.to} one {w.adjective} {time}.",
    "One {w.adjective} {time} the {a.kind} {a.name} was {p.at}.",
    "Once {a.a_trait} named {a.name} lived in {a.home}.",
    "There was once {a.a_trait} called {a.name}.",
    "{a.a_trait!c} called {a.name} was very fond of {a.food}.",
    "{a.name} was {a.a_trait} who lived in {a.home}.",
)
MEETING = (
    "{p.at!c} {a.he} met {b.name} the {b.kind}.",
    "{a.he!c} met {b.a_trait} named {b.name}.",
    "Soon {b.a} called {b.name} came along.",
    "{p.at!c} stood {b.name}, the {b.trait} {b.kind}.",
)
PLOTS = {
    "lost": (
        (
            "{a.he!c} lost {t.a}, and {b.name} the {b.kind} came by.",
            "{a.his!c} {t.adjective} {t.noun} was gone, so {a.he} asked {b.name} the {b.kind}.",
        ),
        (
            '"Have you seen my {t.noun}?" asked {a.name}.',
            '"Where is my {t.noun}, {b.name}?" cried the {a.kind}.',
        ),
        (
            "The {b.kind} found it {p.at}.",
            '"It is {p.at}," said {b.name}, and so it was.',
            "They searched until {w.later}, and {b.name} found it.",
        ),
        (
            "{a.name} gave {b.him} {a.food}.",
            '"Thank you, {b.name}," said the {a.kind}.',
        ),
        ("Four eyes see more than two.", "A friend is the best find."),
    ),
    "share": (
        (
            "{a.he!c} had {n} {f} when {a.he} met {b.name} the {b.kind}.",
            "{a.he!c} found {n} {f}, and {b.a} named {b.name} came by.",
        ),
        (
            '"I am hungry, {a.name}," said the {b.kind}.',
            '"May I have some {f}?" asked {b.name}.',
        ),
        (
            '"Take {k}, and I will keep {m}," said {a.name}.',
            "The {a.kind} gave {b.him} {k} and kept {m}.",
            '"Here are {k}, {b.name}. Now I have {m}," said the {a.kind}.',
        ),
        (
            "In winter {b.name} brought {a.him} {b.food}.",
            "When {w.later}, the {b.kind} came back with {b.food}.",
        ),
        ("What is shared comes back.", "Give today and eat tomorrow."),
    ),
    "race": (
        MEETING,
        (
            '"I am faster than you, {b.name}," said {a.name}.',
            '"Let us race {q.to}," said the {a.kind}.',
        ),
        (
            "{a.he!c} ran {n} miles, then saw {a.food} and stopped to eat.",
            "{a.he!c} was far ahead, but {a.he} fell asleep.",
            "{a.he!c} looked back to laugh and fell over a root.",
        ),
        (
            "The {b.kind} did not stop, and so {b.he} won.",
            "Step by step {b.name} went on and came in first.",
        ),
        ("Slow feet come first.", "Run first and laugh later."),
    ),
    "trick": (
        (
            "{a.he!c} saw {b.name} the {b.kind} with {b.food}.",
            "{p.at!c} {b.a} named {b.name} was eating {b.food}.",
        ),
        (
            '"Look behind you, {b.name}!" cried the {a.kind}.',
            '"How well you sing, {b.name}!" said {a.name}.',
        ),
        (
            "{a.he!c} took the {b.food}, but fell into the mud.",
            "{a.he!c} ran off with the {b.food}, but {w.sky}.",
        ),
        (
            '"Ask, and I will give you half," said the {b.kind}.',
            '"I am sorry, {b.name}," said the {a.kind}.',
        ),
        ("An honest word fills the plate.", "Ask before you take."),
    ),
    "shelter": (
        (
            "One {w.adjective} night {a.he} came to {b.name} the {b.kind}.",
            "Night came, and {a.he} knocked at the door of {b.name} the {b.kind}.",
        ),
        (
            '"May I come in?" asked the {a.kind}.',
            '"I am cold and tired," said {a.name}.',
        ),
        (
            '"Come in, {a.name}," said the {b.kind}.',
            '"There is room for two," said {b.name}.',
        ),
        (
            "They ate {b.food} until {w.later}.",
            "The {b.kind} gave {a.him} {t.a}.",
            "{a.name} mended {n} holes in the roof.",
        ),
        ("An open door makes a friend.", "No house is too small."),
    ),
    "boast": (
        MEETING,
        (
            '"I can jump over {n} fences," said {a.name}.',
            '"I have fought {n} lions," said the {a.kind}.',
            '"I can carry {n} sacks," said {a.name}.',
        ),
        (
            '"Only {n}?" asked the {b.kind}. "Show me."',
            '"I see no {n} here, {a.name}," said {b.name}.',
        ),
        (
            "The {a.kind} tried and fell on {a.his} nose.",
            '"Not today," said {a.name}, "for it is too {w.adjective}."',
            "{a.name} looked at {a.his} feet and said nothing.",
        ),
        ("Big words have short legs.", "Do first and tell later."),
    ),
    "bridge": (
        (
            "On a narrow bridge {a.he} met {b.name}, the {b.trait} {b.kind}.",
            "On a narrow path stood {b.a} named {b.name}.",
        ),
        (
            '"Let me pass, {b.name}," said the {a.kind}.',
            '"I was here first," said {a.name}.',
        ),
        (
            '"No, {a.name}, go back," said the {b.kind}.',
            '"I will not move," said {b.name}.',
        ),
        (
            "They stood there for {n} hours, and {w.sky}.",
            "They pushed, and both fell into the water.",
            "Then {a.name} lay down, and the {b.kind} stepped over {a.him}.",
        ),
        ("Two who push go nowhere.", "Step back and be home first."),
    ),
    "trade": (
        (
            "{a.he!c} wanted {t.a}, and {b.name} the {b.kind} had one.",
            "{p.at!c} {b.a} named {b.name} sold {t.a}.",
        ),
        (
            '"The {t.noun} costs {n} coins," said {b.name}.',
            '"It costs {n} coins, {a.name}," said the {b.kind}.',
        ),
        (
            '"I have {k}," said {a.name}. "Bring {m} more."',
            '"Take {k}, and I will bring {m}," said the {a.kind}.',
        ),
        (
            "{a.he!c} worked {m} days for it, and it was {a.his_own}.",
            "When {w.later}, {a.he} brought the {m}.",
            "{b.name} took {a.food} for the rest.",
        ),
        ("A fair price makes two glad.", "Work fills the purse."),
    ),
    "advice": (
        (
            "{a.he!c} was tired of being {a.trait}, so {a.he} asked {b.name} the {b.kind}.",
            "{a.he!c} could not sleep and went to {b.a} named {b.name}.",
        ),
        (
            '"What shall I do?" asked {a.name}.',
            '"Help me, {b.name}," said the {a.kind}.',
        ),
        (
            '"Bring me {n} stones," said {b.name}.',
            '"Plant {n} trees, {a.name}," said the {b.kind}.',
        ),
        (
            "It took {a.him} {n} days, and {a.he} slept well.",
            '{a.he!c} did so. "Now stay {a.trait}," said the {b.kind}.',
            "After all {n}, {a.name} was tired and glad.",
        ),
        ("Good work is a soft pillow.", "The answer is often at home."),
    ),
    "rescue": (
        (
            "{p.at!c} {b.name} the {b.kind} had fallen into a pit.",
            "{a.he!c} found {b.a} named {b.name} in a net.",
        ),
        (
            '"Help me, {a.name}!" cried the {b.kind}.',
            '"Please do not leave me," said {b.name}.',
        ),
        (
            "{a.he!c} fetched {t.a} and pulled {b.him} out.",
            "{a.he!c} worked for {n} hours, and {b.name} was free.",
            "{a.he!c} called {n} neighbours, and they freed the {b.kind}.",
        ),
        (
            "One year later {b.name} saved {a.him} from a lion.",
            '"I will not forget this, {a.name}," said the {b.kind}.',
        ),
        ("No help is too small.", "A good deed has a long memory."),
    ),
}


class Gaps(string.Formatter):
    """str.format with one more conversion: `!c` makes the first letter a capital."""

    def convert_field(self, value: object, conversion: str | None) -> object:
        if conversion == "c":
            return str(value)[0].upper() + str(value)[1:]
        return super().convert_field(value, conversion)


def tell(beats: tuple[tuple[str, ...], ...], chance: random.Random) -> str:
    """One fable, however long."""
    a, b = (chance.choice(persons) for persons in chance.sample(PERSONS, 2))
    p, q = chance.sample(PLACES, 2)
    total = chance.randrange(4, 11)
    given = chance.randrange(2, total - 1)
    gaps = {
        "a": a,
        "b": b,
        "p": p,
        "q": q,
        "w": chance.choice(WEATHERS),
        "t": chance.choice(THINGS),
        "f": chance.choice(FRUITS),
        "time": chance.choice(TIMES),
        "n": NUMBERS[total],
        "k": NUMBERS[given],
        "m": NUMBERS[total - given],
    }
    return " ".join(Gaps().format(chance.choice(beat), **gaps) for beat in beats)


def tell_fables(count: int = COUNT, seed: int = SEED) -> list[str]:
    """As many different fables, each short enough to be read whole by the model."""
    chance = random.Random(seed)
    fables: dict[str, None] = {}
    while len(fables) < count:
        beats = ((chance.choice(OPENING),), *chance.choice(list(PLOTS.values())))
        while len(fable := tell(beats, chance)) > LONGEST:
            pass
        fables[fable] = None
    return list(fables)


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(tell_fables()) + "\n\n")
