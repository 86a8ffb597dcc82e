"""Words and sentences for the made part of the corpus: plain prose on many subjects, from a seed."""

from __future__ import annotations

import random

SUBJECTS: dict[str, tuple[str, ...]] = {
    "storage": ("the write-ahead log", "the index", "a checkpoint", "the page cache", "the vacuum job", "a snapshot",
                "the replica", "the journal", "compaction", "the lock file", "the bloom filter", "a tombstone"),
    "travel": ("the night train", "the harbour", "a rail pass", "the border crossing", "the hostel", "the old town",
               "a ferry", "the mountain hut", "the bus terminal", "the visa office", "the market street", "the museum"),
    "health": ("the control group", "the dosage", "blood pressure", "the placebo", "a follow-up visit", "the biopsy",
               "the cohort", "sleep quality", "the questionnaire", "a relapse", "the clinic", "the side effects"),
    "finance": ("the quarterly report", "cash flow", "the loan book", "a hedge", "the audit", "the dividend",
                "the exchange rate", "inventory", "the margin", "a supplier", "the forecast", "the tax office"),
    "climate": ("sea ice", "the jet stream", "a drought", "the reef", "soil moisture", "the glacier", "the model run",
                "permafrost", "the heat wave", "cloud cover", "the river delta", "the emission inventory"),
    "software": ("the parser", "the scheduler", "a memory leak", "the test suite", "the deployment", "the feature flag",
                 "the queue", "a race condition", "the changelog", "the linter", "the cache", "the login page"),
    "history": ("the treaty", "the archive", "a chronicle", "the guild", "the siege", "the harvest", "the census",
                "the railway company", "the parish register", "a letter", "the mint", "the expedition"),
    "cooking": ("the dough", "the stock", "a cast-iron pan", "the oven", "fresh thyme", "the marinade", "the glaze",
                "the yeast", "a pinch of salt", "the broth", "the dessert", "the cutting board"),
    "law": ("the clause", "the appeal", "a witness", "the statute", "the contract", "the injunction", "the registry",
            "a precedent", "the hearing", "the settlement", "the licence", "the notary"),
    "space": ("the probe", "the lander", "a solar panel", "the telemetry", "the launch window", "the antenna",
              "the heat shield", "the orbit", "a thruster", "the crater", "the payload", "the ground station"),
}  # fmt: skip
VERBS = (
    "depends on", "slows down", "improves", "is limited by", "was replaced by", "competes with", "hides", "reveals",
    "is checked against", "is older than", "outlasts", "needs", "explains", "contradicts", "is cheaper than",
    "precedes",
    "follows from", "is measured with", "protects", "weakens", "is often confused with", "came before", "drives",
)  # fmt: skip
FRAMES = (
    "{A} {v} {b}.", "In most cases {a} {v} {b}, though not always.", "One source says that {a} {v} {b}.",
    "It is worth noting how {a} {v} {b}.", "Nobody expected that {a} {v} {b}.", "Where {a} fails, {b} takes over.",
    "The figures for {a} come from {n} observations.", "Between {y} and {z}, {a} changed more than {b}.",
    "A closer look at {a} shows {n} open questions.", "Unlike {b}, {a} can be repaired.",
    "{A} and {b} share one cause.",
    "The team measured {a} {n} times and saw {b} move each time.", "Critics point out that {a} rarely {v} {b}.",
    "If {a} were removed, {b} would be the first to suffer.", "About {n} percent of what we know about {a} is recent.",
    "An expert would start with {a} and leave {b} for later.", "Costs for {a} rose while those for {b} fell.",
    "The evidence on {a} is thin, and on {b} it is older than {y}.", "Only {a} has been tested under load.",
    "Two interviews mention {a}; neither explains it.", "{A} arrived late, which changed {b}.",
    "For beginners {a} is the hardest part.", "Nothing in the literature links {a} with {b}.",
    "A simple drawing of {a} would settle the dispute.", "Several towns banned {a} outright.",
    "Engineers prefer {b}; accountants like {a}.", "{A} sounds harmless until somebody asks who pays.",
    "By hand {a} takes a morning.", "Old photographs show {a} beside {b}.", "Rumours about {a} were never confirmed.",
    "Insurance covers {a} only in winter.", "Children understand {a} sooner than adults do.",
    "What matters in the end is {a}.", "Compared with the neighbours, {a} looks modest.",
    "{A} broke twice before anybody wrote down why.", "Without {b}, training for {a} would be pointless.",
)  # fmt: skip
DETAILS = (
    "early", "remote", "careful", "costly", "local", "seasonal", "unusual", "public", "hidden", "regular", "northern",
    "manual", "shared", "broken", "modern", "crowded", "silent", "heavy", "foreign", "partial", "urgent", "final",
)  # fmt: skip


class Writer:
    """Writes about one subject; what it wrote once it does not write again. Every second one writes no numbers."""

    def __init__(self, chance: random.Random, subject: str | None = None) -> None:
        self.chance = chance
        numbers = chance.random() < 0.5
        self._frames = [frame for frame in FRAMES if numbers or not any(mark in frame for mark in ("{n}", "{y}"))]
        self.subject = subject or chance.choice(sorted(SUBJECTS))
        self._written: set[str] = set()
        self._things = SUBJECTS[self.subject]

    def thing(self) -> str:
        """Something of the subject, sometimes with a detail."""
        name = self.chance.choice(self._things)
        if self.chance.random() < 0.5 or " " not in name:
            return name
        article, _, rest = name.partition(" ")
        return f"{article} {self.chance.choice(DETAILS)} {rest}" if article in {"the", "a"} else name

    def sentence(self) -> str:
        """One that it has not written before."""
        while True:
            first, second = self.thing(), self.thing()
            year = self.chance.randint(1850, 2015)
            text = self.chance.choice(self._frames).format(
                a=first,
                A=first[0].upper() + first[1:],
                b=second,
                v=self.chance.choice(VERBS),
                n=self.chance.randint(3, 900),
                y=year,
                z=year + self.chance.randint(2, 10),
            )
            if first != second and text not in self._written:
                self._written.add(text)
                return text

    def paragraph(self, least: int = 3, most: int = 8) -> str:
        """Some sentences, about some of the subject's things."""
        self._things = tuple(self.chance.sample(SUBJECTS[self.subject], 4))
        return " ".join(self.sentence() for _ in range(self.chance.randint(least, most)))
