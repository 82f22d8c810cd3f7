"""Write data/train.jsonl and data/validation.jsonl: free text and a schema in, JSON out. Every run writes the same files.

    python demo/make_data.py

Entities (people, companies, products, cities, events, venues) are made of words from two lists without overlap, one for
each file; a run checks that no held-out word occurs in the training text.
"""

import json
import pathlib
import random
import re
from collections.abc import Callable
from typing import Any

Pick = Callable[[str], str]  # draws an entity of a kind
Fields = dict[str, Any]

TRAIN_ROWS, HELD_OUT_ROWS, SEED = 400, 60, 2026
FOLDER = pathlib.Path(__file__).resolve().parent.parent / "data"

# Each list is (words of training entities, words of held-out entities). Entities are drawn from many words, so that the
# model learns to copy what it reads and not to choose among names that it has seen.
WORDS = {
    "first": (
        "Anna Tom Lucia Omar Mei Peter Sara Ivan Grace David Elena Marc Julia Hugo Nina Adam Rosa Leo Fatima "
        "Karl Maya Noah Emma Victor Hanna Paul Sofia Ben Lena Jonas Aisha Erik Clara Daniel Irina Walter "
        "Yusuf Olga Pedro Kim Teresa Magnus Joan Arthur Bella Chen Dora Edgar Flora Gustav Helen Isaac Jana "
        "Kofi Lydia Mario Nadia Otto Paula Quentin Rita Simon Tara Umberto Vera Wendy Xavier Yara Zeno",
        "James Mary John Linda Robert Alice Henry George Susan Charles Emily Jack",
    ),
    "last": (
        "Berg Fischer Romano Haddad Tanaka Novak Lindgren Petrov Okafor Cohen Popescu Dubois Weber Silva "
        "Kowalski Clark Jimenez Brandt Jensen Patel Smith Laurent Ruiz Virtanen Meyer Costa Walker Schulz "
        "Keller Khan Olsen Moreau Park Lopez Nguyen Hughes Ito Barros Quinn Ferreira Lang Dogan Reyes "
        "Svensson Baker Molina Fontaine Grant Hoffman Ivanov Jones Klein Lambert Murphy Nowak Pereira Rossi "
        "Sato Turner Urban Vogel Winter Yilmaz Zimmer",
        "Brown Johnson Williams Taylor Miller Davis Wilson Moore White Harris Lewis King",
    ),
    "firm": (
        "Northwind Harbor Acme Solaris Bright Green Metro Delta Silver Pixel Iron Cloud Red Sunrise Copper "
        "Lakeside Atlas Orbit Golden Quick Pure Terra Alpine Crystal Summit Maple Velvet Urban Royal Prime "
        "Ocean Nova Lunar Jade Indigo Horizon Forest Eagle Diamond Canyon",
        "Star River Mountain Liberty Pioneer Rainbow Fire Global",
    ),
    "trade": (
        "Tools Energy Labs Farms Print Logistics Forge Bridge Foods Media Motors Systems Travel Parcel Water "
        "Sports Bank Books Dental Optics Fabrics Garden Security Shipping Studio Trading Wines Paper",
        "Records Hotels Insurance Airlines Software Homes",
    ),
    "quality": (
        "desk office travel garden rain winter summer steel wooden folding electric pocket kitchen baby "
        "camping beach leather paper glass silver cotton bath party floor wall studio school music",
        "plastic family fishing sports computer wedding",
    ),
    "thing": (
        "lamp chair bottle shoes grinder case hose scarf helmet stand kettle clock pillow jacket shredder mat "
        "box knife frame fan tent mixer curtain brush shelf towel table cup radio bag mirror plate ladder rug",
        "boots basket gloves bowl dress camera",
    ),
    "city": (
        "Berlin Paris Madrid Rome Oslo Vienna Dublin Lisbon Prague Warsaw Athens Helsinki Boston Denver "
        "Chicago Seattle Toronto Tokyo Seoul Sydney Geneva Hamburg Milan Porto Austin Dallas Atlanta Montreal "
        "Cairo Delhi Lima Bogota Quito Havana Nairobi Lagos Dakar Tunis Riga Tallinn Vilnius Sofia Zagreb "
        "Belgrade Bern Basel Lyon Nice Turin Genoa Seville Malaga Leeds Bristol Cardiff Glasgow Utrecht "
        "Bremen Dresden Krakow Gdansk Tampa Omaha Boise Reno Memphis Calgary Kyoto Osaka Busan Perth Darwin "
        "Hanoi Manila Jakarta Mumbai",
        "London Houston Miami Detroit Singapore Barcelona Vancouver Portland Cleveland Phoenix",
    ),
    "topic": (
        "Spring Budget Team Book Design Science Charity Safety Film Garden Job Chess Press Board Winter Music "
        "Sales Travel Photo Health History Cooking Family Startup",
        "Art Language Dance Theatre Computer Summer",
    ),
    "meeting": (
        "Concert Review Lunch Club Workshop Fair Run Launch Training Night Party Evening Briefing Meeting "
        "Festival Tour Debate Camp Dinner Quiz Talk",
        "Market Seminar Conference Lecture Exhibition Parade",
    ),
    "hall": (
        "Room Hall Studio Gallery Cafe Library Tower Terrace Court Salon",
        "Theater House Arena Center",
    ),
}
MONTHS = "January February March April May June July August September October November December".split()


def entities(part: int, rng: random.Random) -> Pick:
    """Return a function that draws an entity of a kind, of training words (part 0) or held-out words (part 1)."""
    words = {name: lists[part].split() for name, lists in WORDS.items()}
    kinds = {
        "person": ("first", "last"), "company": ("firm", "trade"), "product": ("quality", "thing"), "city": ("city",),
        "event": ("topic", "meeting"),
    }  # fmt: skip

    def pick(kind):
        if kind == "venue":
            return f"{rng.choice(words['hall'])} {rng.choice('ABCDEFGH')}{rng.randint(1, 40)}"
        return " ".join(rng.choice(words[name]) for name in kinds[kind])

    return pick


def contact(pick: Pick, rng: random.Random) -> tuple[Fields, list[str]]:
    """Draw a person, a company and a phone number; return the fields and the texts that can hold them."""
    name, company = pick("person"), pick("company")
    fields = {
        "name": name,
        "company": company,
        "phone": f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
    }
    texts = [
        "Hi, this is {name} from {company}. You can call me at {phone}.",
        "{company} has a new contact: {name}, phone {phone}.",
        "Kind regards, {name}, {company}, tel. {phone}",
        "Spoke with {name} today ({company}). Number: {phone}.",
        "de: Guten Tag, hier {name} von {company}. Meine Nummer ist {phone}.",
        "es: Hola, soy {name} de {company}. Mi teléfono es {phone}.",
        "zh: 您好，我是{company}的{name}，电话{phone}。",
    ]
    return fields, texts


def order(pick: Pick, rng: random.Random) -> tuple[Fields, list[str]]:
    """Draw a product, how many, at which price, for which city; return the fields and the texts that can hold them."""
    fields = {
        "product": pick("product"),
        "quantity": rng.randint(2, 40),
        "price": f"{rng.randint(3, 90)}.{rng.choice(['00', '50', '90', '95'])}",
        "city": pick("city"),
    }
    fields["price"] = float(fields["price"])
    texts = [
        "We need {quantity} units of the {product} at {price} each, shipped to {city}.",
        "Order for {city}: {product}, {quantity} pieces, {price} per piece.",
        "Could you send {quantity} times the {product} to our office in {city}? The price of {price} is fine.",
        "At {price} apiece I will take {quantity} of the {product}. Deliver to {city}, please.",
        "fr: Bonjour, je voudrais {quantity} exemplaires du produit {product} à {price} pièce, livraison à {city}.",
        "de: Bitte liefern Sie {quantity} Stück {product} zu je {price} nach {city}.",
    ]
    return fields, texts


def event(pick: Pick, rng: random.Random) -> tuple[Fields, list[str]]:
    """Draw a title, a date, a time and a place; return the fields and the texts that can hold them."""
    fields = {
        "title": pick("event"),
        "date": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        "time": f"{rng.randint(8, 21):02d}:{rng.choice(['00', '15', '30', '45'])}",
        "place": pick("venue"),
    }
    texts = [
        "The {title} takes place on {date} at {time} in {place}.",
        "Reminder: {title}, {date}, {time}, {place}.",
        "Join us in {place} for the {title}! We start at {time} on {date}.",
        "On {date} we meet at {time} for the {title}. Place: {place}.",
        "es: El evento {title} será el {date} a las {time} en {place}.",
    ]
    return fields, texts


def booking(pick: Pick, rng: random.Random) -> tuple[Fields, list[str]]:
    """Draw a passenger, a journey and a number of seats; return the fields and the texts that can hold them."""
    start, end = pick("city"), pick("city")
    while end == start:
        end = pick("city")
    fields = {"passenger": pick("person"), "from": start, "to": end, "seats": rng.randint(1, 9)}
    texts = [
        "{passenger} wants to travel from {from} to {to}, {seats} seats in total.",
        "Book {seats} seats to {to} for {passenger}; departure is {from}.",
        "Trip request by {passenger}: start {from}, destination {to}, seats {seats}.",
        "From {from} please, going to {to}. We are {seats} people, the name is {passenger}.",
        "fr: {passenger} souhaite réserver {seats} places de {from} à {to}.",
        "zh: {passenger}要预订{seats}张从{from}到{to}的票。",
    ]
    return fields, texts


KINDS = {"contact": contact, "order": order, "event": event, "booking": booking}
OPTIONAL = {"contact": {"phone": ["Hi, this is {name} from {company}. I will send you my number later.",
                                  "New contact at {company}: {name}. No number so far."]},
            "event": {"time": ["The {title} takes place on {date} in {place}. The time will follow.",
                               "Save the date: {title}, {date}, {place}."]}}  # fmt: skip
SYSTEMS = [
    None,
    "Answer with JSON only.",
    "You turn text into JSON.",
]
ASKS = [
    "Extract {schema} as JSON: {text}",
    "{text}\n\nJSON with {schema}:",
    "{text}\n\nGive me {schema} as JSON.",
    "Fill in {schema}, null for what is missing.\n\n{text}",
]
CORRECTIONS = [
    "Sorry, {field} must be {value}.",
    "One correction: {field} is {value}.",
    "Please change {field} to {value}.",
]


def row(
    rng: random.Random, pick: Pick, foreign: bool = False, gap: bool = False, correction: bool = False
) -> dict[str, list[dict[str, str]]]:
    """Return a conversation with one assistant turn, or with two if there is a correction."""
    kind = rng.choice(list(OPTIONAL) if gap else list(KINDS))
    fields, texts = KINDS[kind](pick, rng)
    text = rng.choice([text for text in texts if foreign == (text[2] == ":")])
    if gap:
        missing = rng.choice(list(OPTIONAL[kind]))
        text = rng.choice(OPTIONAL[kind][missing])
        fields[missing] = None
    text = text.format(**fields)
    schema = ", ".join(fields)
    messages = [
        {"role": "user", "content": rng.choice(ASKS).format(schema=schema, text=text[4:] if foreign else text)},
        {"role": "assistant", "content": json.dumps(fields, ensure_ascii=False)},
    ]
    if correction:
        other, _ = KINDS[kind](pick, rng)
        field = rng.choice([field for field in fields if other[field] != fields[field]])
        ask = rng.choice(CORRECTIONS).format(field=field, value=other[field])
        fields[field] = other[field]
        messages += [
            {"role": "user", "content": ask},
            {"role": "assistant", "content": json.dumps(fields, ensure_ascii=False)},
        ]
    system = rng.choice(SYSTEMS)
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def rows(count: int, part: int) -> list[dict[str, list[dict[str, str]]]]:
    """Return different conversations: 1 in 8 in another language, 1 in 8 with a gap, 1 in 6 with a correction."""
    rng = random.Random(SEED + part)
    pick, result = entities(part, rng), []
    while len(result) < count:
        i = len(result)
        made = row(rng, pick, foreign=i % 8 == 3, gap=i % 8 == 6, correction=i % 6 == 5 and i % 8 not in (3, 6))
        if made not in result:
            result.append(made)
    rng.shuffle(result)
    return result


def main() -> None:
    """Write both files."""
    train, held_out = rows(TRAIN_ROWS, 0), rows(HELD_OUT_ROWS, 1)
    seen = "".join(message["content"] for made in train for message in made["messages"])
    for name, (_, unseen) in WORDS.items():
        for word in unseen.split():
            if re.search(rf"\b{word}\b", seen):
                raise SystemExit(f"the held-out word {word!r} ({name}) occurs in the training text")
    for name, made in (("train", train), ("validation", held_out)):
        with open(FOLDER / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in made)
        print(f"{name}.jsonl: {len(made)} conversations")


if __name__ == "__main__":
    main()
