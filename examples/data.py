"""The two synthetic tasks: pure functions of a seed, nothing read, nothing downloaded.

dates: a line of free text about an event -> strict JSON. One answer is right, so the score is exact match.
style: a question -> a terse ship's log. No answer is right, but the form can be checked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta


@dataclass(frozen=True)
class Example:
    """prompt: the user's message; answer: what the assistant is to reply, without the end token."""

    prompt: str
    answer: str


# --- dates ------------------------------------------------------------------------------------------------------------

MONTHS = (
    "January February March April May June July August September October November December".split()
)  # fmt: skip
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third "
    "twenty-fourth twenty-fifth twenty-sixth twenty-seventh twenty-eighth twenty-ninth thirtieth thirty-first"
).split()
HOURS = "twelve one two three four five six seven eight nine ten eleven".split()
EVENTS = (
    "dentist", "team lunch", "choir practice", "budget review", "piano lesson", "car service", "board meeting",
    "eye test", "book club", "flat viewing", "job interview", "parents' evening", "yoga class", "tax deadline",
    "farewell dinner", "swimming lesson", "fire drill", "haircut", "garden party", "physics exam", "site visit",
    "movie night", "vet appointment", "rehearsal", "product launch", "chess match", "phone call with Ana",
    "train to Leeds", "concert", "blood test", "wedding", "pottery class",
)  # fmt: skip


def _suffix(day: int) -> str:
    return "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def _date_text(rng: random.Random, day: date) -> str:
    month = MONTHS[day.month - 1]
    forms = (
        f"{day.day} {month} {day.year}",
        f"{month} {day.day}{_suffix(day.day)}, {day.year}",
        f"{month[:3]} {day.day} {day.year}",
        f"{day.day:02}/{day.month:02}/{day.year}",
        f"{day.day}.{day.month}.{day.year % 100:02}",
        f"the {ORDINALS[day.day - 1]} of {month} {day.year}",
    )
    return rng.choice(forms)


def _part_of_day(hour: int) -> str:
    if hour < 12:
        return "in the morning"
    return "in the afternoon" if hour < 18 else "in the evening"


def _time_text(rng: random.Random, hour: int, minute: int) -> str:
    half = "am" if hour < 12 else "pm"
    short = hour % 12 or 12
    forms = [f"{hour:02}:{minute:02}", f"{short}:{minute:02} {half}", f"{hour:02}h{minute:02}"]
    if minute == 0:
        forms += [f"{short}{half}", f"{HOURS[hour % 12]} o'clock {_part_of_day(hour)}"]
    elif minute == 15:
        forms.append(f"quarter past {HOURS[hour % 12]} {_part_of_day(hour)}")
    elif minute == 30:
        forms.append(f"half past {HOURS[hour % 12]} {_part_of_day(hour)}")
    elif minute == 45:
        forms.append(f"quarter to {HOURS[(hour + 1) % 12]} {_part_of_day(hour)}")
    return rng.choice(forms)


def _dates_example(rng: random.Random, day: date) -> Example:
    what = rng.choice(EVENTS)
    on = _date_text(rng, day)
    frames: tuple[str, ...]
    if rng.random() < 0.15:
        time, at = None, ""
        frames = (f"{what} on {on}", f"{on}: {what}, all day", f"Don't forget the {what}, {on}.")
    else:
        hour, minute = rng.randrange(7, 23), rng.choice((0, 0, 15, 30, 45, rng.randrange(60)))
        time, at = f"{hour:02}:{minute:02}", _time_text(rng, hour, minute)
        frames = (
            f"{what} on {on} at {at}",
            f"{on}, {at}: {what}",
            f"The {what} is at {at} on {on}.",
            f"Please note the {what}, {on}, {at}.",
        )
    answer = json.dumps({"what": what, "date": day.isoformat(), "time": time})
    return Example(f"To JSON (what, date, time): {rng.choice(frames)}", answer)


def dates(seed: int, count: int, *, held_out: bool) -> list[Example]:
    """`count` examples, no two alike. Every fifth day of the calendar is kept for the held-out ones, so a held-out
    answer has never been trained on, in whatever words."""
    first = date(2024, 1, 1)
    days = [first + timedelta(days=i) for i in range(4 * 365) if (i % 5 == 0) == held_out]
    rng = random.Random(f"dates {seed} {held_out}")
    return _distinct(lambda: _dates_example(rng, rng.choice(days)), count)


# --- style ------------------------------------------------------------------------------------------------------------

# topic: two plain facts, so that the log says something true.
FACTS = {
    "honey": ("Made by bees from nectar", "Keeps for years when sealed"),
    "volcanoes": ("Molten rock rises through the crust", "Ash can ground aircraft for days"),
    "bread": ("Flour, water, salt and yeast", "Needs time to rise and a hot oven"),
    "the moon": ("Circles the Earth in 27 days", "Pulls the tides twice daily"),
    "chess": ("Two players, sixteen pieces each", "Checkmate ends the game"),
    "rain": ("Vapour cools and falls as drops", "Fills rivers and barrels alike"),
    "cats": ("Sleep most of the day", "Hunt at dusk and at dawn"),
    "glass": ("Sand melted at great heat", "Brittle when cold, soft when hot"),
    "trees": ("Drink by the root, feed by the leaf", "One ring added every year"),
    "coffee": ("Seeds of a cherry, roasted dark", "Keeps the watch awake"),
    "the heart": ("Pumps blood night and day", "Beats about seventy times a minute"),
    "salt": ("Taken from sea and mine", "Preserves meat and lowers freezing point"),
    "maps": ("Round world drawn on flat paper", "Scale and north must be marked"),
    "whales": ("Breathe air and surface often", "Largest creatures alive"),
    "iron": ("Strong metal, rusts in salt air", "Smelted from red ore"),
    "sleep": ("Eight hours restore most hands", "Dreams come late in the night"),
    "snow": ("Crystals of ice with six arms", "Quiets the land"),
    "gold": ("Heavy, soft and never rusts", "Sought by many, found by few"),
    "music": ("Sound ordered in time", "Lifts the spirits of any crew"),
    "the sun": ("Burning star at the centre", "Light takes eight minutes to reach us"),
    "paper": ("Pulp of wood pressed thin", "Burns easily, keep it dry"),
    "cheese": ("Milk curdled, pressed and aged", "Stores well in a cool hold"),
    "bicycles": ("Two wheels, one chain, two pedals", "Balance comes with speed"),
    "clocks": ("Gears count the swing of a pendulum", "Good ones lose a second a week"),
    "penguins": ("Birds that swim and do not fly", "Huddle against the cold"),
    "tea": ("Leaves steeped in hot water", "Four minutes is enough"),
    "rivers": ("Run downhill to the sea", "Carve valleys given time"),
    "wool": ("Shorn from sheep in spring", "Warm even when wet"),
    "lightning": ("Charge leaps from cloud to ground", "Thunder follows, count the seconds"),
    "potatoes": ("Grow underground from cut pieces", "Boil twenty minutes"),
    "bridges": ("Carry roads over water", "Arch, beam or cable holds the load"),
    "spiders": ("Eight legs and fine silk", "Most are harmless to the crew"),
}  # fmt: skip
QUESTIONS = (
    "Tell me about {}.", "What should I know about {}?", "Explain {}.", "Can you describe {}?", "What about {}?",
)  # fmt: skip
HELD_OUT_PROMPTS = (
    "Tell me about apples.", "How do I make an omelette?", "What is gravity?", "Explain photosynthesis.",
    "Who was Isaac Newton?", "What should I know about bears?", "How do I learn to swim?", "What is a computer?",
    "Describe the city of Paris.", "Why is the sky blue?", "Give me advice for a job interview.",
    "What is the capital of Japan?", "How does a telephone work?", "Tell me about elephants.", "What is inflation?",
    "How do I plant a garden?", "Explain what a poem is.", "What about ice cream?", "Can you describe a desert?",
    "How far away is Mars?", "What is a good breakfast?", "Tell me about the Romans.", "How do magnets work?",
    "What is friendship?",
)  # fmt: skip
OPENINGS = ("Clear skies.", "Wind from the west.", "Calm sea.", "Fog at dawn.", "Fair wind.", "Heavy swell.")
CLOSINGS = ("All hands well.", "Course steady.", "Holding position.", "No more to report.", "Sails trimmed.")


def _style_example(rng: random.Random) -> Example:
    topic, facts = rng.choice(sorted(FACTS.items()))
    body = " ".join(f"{fact}." for fact in facts)
    answer = f"Log: {rng.choice(OPENINGS)} {body} {rng.choice(CLOSINGS)} Over."
    return Example(rng.choice(QUESTIONS).format(topic), answer)


def style(seed: int, count: int, *, held_out: bool) -> list[Example]:
    """`count` examples, no two alike; the held-out ones are at most 24 questions on other topics, without answers."""
    if held_out:
        return [Example(prompt, "") for prompt in HELD_OUT_PROMPTS[:count]]
    rng = random.Random(f"style {seed}")
    return _distinct(lambda: _style_example(rng), count)


# ----------------------------------------------------------------------------------------------------------------------


def _distinct(draw: Callable[[], Example], count: int) -> list[Example]:
    def drawn() -> Iterator[Example]:
        seen: set[Example] = set()
        while True:
            example = draw()
            if example not in seen:
                seen.add(example)
                yield example

    source = drawn()
    return [next(source) for _ in range(count)]


TASKS: dict[str, Callable[..., list[Example]]] = {"dates": dates, "style": style}
