"""The texts that models are compared on, one per domain, and the prompts that they continue.

Written for this purpose, so that no model can have learnt them by heart, and anybody may use them. Short ones: they
show in which kinds of text two models differ; for figures to publish take `loadstone eval` and a real test set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ..errors import LoadstoneError
from ..evaluate.perplexity import Text, read_text, text_of

PROMPTS = ("The meaning of life is", "Once upon a time there was", '"Where have you been?" she asked.')

_PROSE = """\
The lighthouse had been empty for eleven years when Martha bought it, and the man who sold it to her could not say \
why anybody would want it. The stairs were sound, he said, but the roof let in the rain, and in winter the road was \
under water twice a day. She thanked him, took the key, and walked down to the shore alone. It was late in \
September. The wind had dropped, and the sea lay grey and flat, like a sheet that somebody had pulled straight. \
Above the door she could still read the date at which the tower was built, and below it a name that the salt had \
almost taken away. She sat down on the step with her back to the warm stone. For the first time in months there was \
nothing that she had to do before evening. A gull came down on the wall, looked at her with one yellow eye, found \
that she had brought no bread, and stayed nevertheless. By the time the light began to go she had decided which of \
the rooms would be the kitchen.
"""

_DIALOGUE = """\
"You are early," said the old man, without looking up from his book.
"The train was on time for once. May I sit down?"
"If you can find a chair. Mind the cat."
She lifted the cat, which did not wake, and sat down with it on her knees. "You know why I am here."
"I have a good idea. Your brother has written to you, and he has told you that I will not sell the house."
"Will you?"
"No."
"Not even the garden?"
"Least of all the garden! Who would look after the apple trees? Your brother does not know an apple from a pear."
She laughed in spite of herself. "He wanted me to be angry with you. I promised that I would try."
"And are you?"
"Not yet. Is there any tea?"
"There is always tea," he said, and closed the book at last. "Tell me about the children. Does Anna still want to be \
a doctor, or is it something else this week?"
"A pilot," she said. "Since Tuesday."
"Well, I am glad that somebody in this family means to leave the ground."
"""

_REPORT = """\
The city council voted on Thursday to close the old bridge to cars from next spring, after engineers found cracks in \
two of its seven piers. The decision was passed by 31 votes to 14. Pedestrians and cyclists will still be able to \
cross, and buses will be sent over the new bridge, about two miles to the north. According to the mayor, repairs \
will cost at least 12 million dollars and take three years. "Nobody likes to be told to take the long way round," \
she said at a news conference, "but we will not wait until something falls into the river." Shop owners on the east \
bank have warned that they will lose customers. A spokesman for their association said that sales fell by a fifth \
when the bridge was closed for four weeks in 2019, and he called on the city to pay for the losses. The government \
of the state has offered to meet half of the costs. The opposition wants an inquiry into why the damage was not \
found in earlier inspections.
"""

_FACTS = """\
Water boils at 100 degrees Celsius at sea level, and at about 71 degrees on the top of Mount Everest. The heart of \
an adult beats between 60 and 100 times a minute at rest. Iron is the most common element on Earth by mass, followed \
by oxygen. Light takes about eight minutes to travel from the Sun to the Earth. The capital of Australia is \
Canberra, and not Sydney. The Nile flows north and ends in the Mediterranean Sea. Spiders have eight legs, insects \
have six. The first printed book in Europe was made in Mainz in the 1450s by Johannes Gutenberg. A triangle whose \
sides are 3, 4 and 5 has a right angle. The Great Fire of London began in a bakery in 1666 and burned for four days. \
Sound travels faster in water than in air. Mercury is the only metal that is liquid at room temperature. The human \
body has 206 bones, and more than half of them are in the hands and feet. Whales are mammals: they breathe air and \
feed their young with milk.
"""

_VERSE = """\
The lamp is low, the road is long,
The river keeps its ancient song,
And those who walked with me by day
Have turned aside and gone away.

I hear the owl among the trees,
The dry leaves talking in the breeze,
And far below, a single bell
That has but one thing left to tell:

That summer's gold is put to bed,
The swallow and the rose are fled,
And every door is shut and barred
Against the frost that walks the yard.

Yet in the dark, beneath the snow,
Where neither moon nor star can go,
The seed lies folded, small and deep,
And dreams of April in its sleep.

So let me go, and have no fear;
The longest night divides the year,
And he that waits shall see the sun
Come up before the night is done.
"""

_CODE = '''\
import csv
from collections import defaultdict
from pathlib import Path


class Account:
    """Money of one customer, in cents."""

    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError(f"{self.owner} has only {self.balance}")
        self.balance -= amount


def read_totals(path):
    """Return the sum of all amounts for each customer."""
    totals = defaultdict(int)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            totals[row["customer"]] += int(row["amount"])
    return dict(totals)


def main():
    accounts = []
    for path in sorted(Path("data").glob("*.csv")):
        for owner, total in read_totals(path).items():
            accounts.append(Account(owner, total))
    accounts.sort(key=lambda account: account.balance, reverse=True)
    for account in accounts[:10]:
        print(f"{account.owner:<20} {account.balance / 100:>10.2f}")


if __name__ == "__main__":
    main()
'''

DOMAINS: Mapping[str, str] = MappingProxyType(
    {"prose": _PROSE, "dialogue": _DIALOGUE, "news report": _REPORT, "facts": _FACTS, "verse": _VERSE, "code": _CODE}
)


def read_texts(given: Sequence[str] = ()) -> dict[str, Text]:
    """Domain -> text: the built-in ones, or in their stead those of `NAME=FILE`, in order.

    Raises LoadstoneError if one is not NAME=FILE, a name comes twice, or a file is empty or no UTF-8.
    """
    if not given:
        return {name: text_of(text, f"built-in: {name}") for name, text in DOMAINS.items()}
    found: dict[str, Text] = {}
    for item in given:
        name, _, path = item.partition("=")
        if not (name.strip() and path):
            raise LoadstoneError(f"--text {item}: expected NAME=FILE, for example --text letters=letters.txt.")
        if name in found:
            raise LoadstoneError(f"--text {item}: there is a text of that name already. Give each its own.")
        found[name] = read_text(Path(path))
    return found
