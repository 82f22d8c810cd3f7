"""Write train.jsonl and validation.jsonl: free text and a schema in, JSON out. Same files every time.

    python data/make_data.py

Entities (people, companies, products, places, streets) come from two lists without overlap, one for each file; a run
checks that no held-out entity occurs in the training text.
"""

import json
import pathlib
import random

TRAIN_ROWS, HELD_OUT_ROWS, SEED = 480, 60, 2026
FOLDER = pathlib.Path(__file__).resolve().parent

# Each pool is (training entities, held-out entities).
POOLS = {
    "person": (
        "Anna Berg|Tom Fischer|Lucia Romano|Omar Haddad|Mei Tanaka|Peter Novak|Sara Lindgren|Ivan Petrov|Grace Okafor|"
        "David Cohen|Elena Popescu|Marc Dubois|Julia Weber|Hugo Silva|Nina Kowalski|Adam Clark|Rosa Jimenez|Leo Brandt|"
        "Fatima Zahra|Karl Jensen|Maya Patel|Noah Smith|Emma Laurent|Victor Ruiz|Hanna Virtanen|Paul Meyer|"
        "Sofia Costa|Ben Walker|Lena Schulz|Jonas Keller|Aisha Khan|Erik Olsen|Clara Moreau|Daniel Park|Irina Sokolova",
        "Greta Holm|Samuel Ortega|Priya Nair|Felix Wagner|Amelia Stone|Bruno Marino|Zoe Martin|Tariq Aziz|"
        "Ingrid Dahl|Oscar Vega|Naomi Frank|Ruth Adler",
    ),
    "company": (
        "Northwind|Blue Harbor|Acme Tools|Solaris Energy|Bright Labs|Green Valley Farms|Metro Print|Delta Logistics|"
        "Silver Oak|Pixel Forge|Iron Bridge|Cloud Nine|Red Maple|Sunrise Foods|Stone & Co|Lakeside Media|Atlas Motors|"
        "Orbit Systems|Golden Gate Travel|Quick Parcel|Pure Water|Terra Nova|Alpine Sports|Crystal Clean|Summit Bank",
        "Falcon Freight|Willow Books|Coral Bay|Granite Works|Polar Optics|Amber Dental|Meadow Dairy|Swift Cargo",
    ),
    "product": (
        "desk lamp|office chair|water bottle|running shoes|coffee grinder|phone case|garden hose|wool scarf|bike helmet|"
        "laptop stand|tea kettle|wall clock|travel pillow|rain jacket|paper shredder|yoga mat|tool box|bread knife|"
        "photo frame|desk fan|camping tent|hand mixer|shower curtain|pencil case|music stand|floor mat",
        "picnic basket|reading lamp|hiking boots|soup bowl|winter gloves|storage box|kitchen scale|alarm clock",
    ),
    "city": (
        "Berlin|Paris|Madrid|Rome|Oslo|Vienna|Dublin|Lisbon|Prague|Warsaw|Athens|Helsinki|Boston|Denver|Chicago|Seattle|"
        "Toronto|Tokyo|Seoul|Sydney|Geneva|Hamburg|Milan|Porto|Austin|Dallas|Atlanta|Montreal",
        "London|Munich|Zurich|Vancouver|Naples|Portland|Brussels|Stockholm|Houston|Barcelona",
    ),
    "event": (
        "Spring Concert|Budget Review|Team Lunch|Book Club|Design Workshop|Science Fair|Charity Run|Open House|"
        "Product Launch|Safety Training|Film Night|Garden Party|Job Fair|Chess Evening|Press Briefing|Board Meeting",
        "Poetry Evening|Harvest Market|Sales Meeting|Art Auction|Safety Drill|Summer Picnic",
    ),
    "venue": (
        "Room 12|City Hall|the Old Library|Hall B|the Blue Cafe|Riverside Park|Studio 4|the Town Theatre|Room 204|"
        "the Sports Center|Gallery West|the Main Office|Hotel Astoria|the Green Room",
        "Room 310|Hall D|the Lake House|the Grand Hotel|Studio 9|the East Garden",
    ),
}
MONTHS = "January February March April May June July August September October November December".split()


def pools(part):
    """The entity lists for part 0 (training) or 1 (held out)."""
    return {name: lists[part].split("|") for name, lists in POOLS.items()}


def contact(pick, rng):
    name, company = pick("person"), pick("company")
    user, host = name.lower().replace(" ", "."), company.lower().replace(" & ", "").replace(" ", "")
    fields = {
        "name": name,
        "company": company,
        "email": f"{user}@{host}.com",
        "phone": f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
    }
    texts = [
        "Hi, this is {name} from {company}. You can reach me at {email} or call {phone}.",
        "{company} has a new contact: {name}, phone {phone}, email {email}.",
        "Please write to {email}. Kind regards, {name}, {company}, tel. {phone}",
        "Spoke with {name} today ({company}). Number: {phone}. Mail: {email}.",
        "de: Guten Tag, mein Name ist {name} von {company}. Meine Nummer ist {phone}, meine E-Mail {email}.",
        "es: Hola, soy {name} de {company}. Mi correo es {email} y mi teléfono es {phone}.",
        "zh: 您好，我是{company}的{name}，电话{phone}，邮箱{email}。",
    ]
    return fields, texts


def order(pick, rng):
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


def event(pick, rng):
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


def booking(pick, rng):
    start = pick("city")
    fields = {
        "passenger": pick("person"),
        "from": start,
        "to": pick("city", start),
        "seats": rng.randint(1, 9),
    }
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
OPTIONAL = {"contact": {"phone": ["Hi, this is {name} from {company}. You can reach me at {email}.",
                                  "New contact at {company}: {name}, email {email}. No number so far."]},
            "event": {"time": ["The {title} takes place on {date} in {place}. The time will follow.",
                               "Save the date: {title}, {date}, {place}."]}}  # fmt: skip
SYSTEMS = [
    None,
    "You extract data. Answer with JSON only.",
    "You turn text into JSON that follows the given schema.",
]
ASKS = [
    "Extract the fields {schema} as JSON.\n\n{text}",
    "Text: {text}\n\nReturn a JSON object with {schema}.",
    "{text}\n\nGive me {schema} from this text, as JSON.",
    "Read this message and fill in {schema}. Use null for what is missing.\n\n{text}",
]
CORRECTIONS = [
    "Sorry, {field} must be {value}.",
    "One correction: {field} is {value}.",
    "Please change {field} to {value}.",
]


def row(rng, names, foreign=False, gap=False, correction=False):
    """One conversation of one, or with a correction two, assistant turns."""

    def pick(pool, other=None):
        return rng.choice([name for name in names[pool] if name != other])

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
        field = rng.choice([field for field in fields if other[field] != fields[field] and field != "email"])
        ask = rng.choice(CORRECTIONS).format(field=field, value=other[field])
        fields[field] = other[field]
        messages += [
            {"role": "user", "content": ask},
            {"role": "assistant", "content": json.dumps(fields, ensure_ascii=False)},
        ]
    system = rng.choice(SYSTEMS)
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def rows(count, part):
    """`count` different conversations: 1 in 8 in another language, 1 in 8 with a gap, 1 in 6 with a correction."""
    rng, names = random.Random(SEED + part), pools(part)
    result = []
    while len(result) < count:
        i = len(result)
        made = row(rng, names, foreign=i % 8 == 3, gap=i % 8 == 6, correction=i % 6 == 5 and i % 8 not in (3, 6))
        if made not in result:
            result.append(made)
    rng.shuffle(result)
    return result


def main():
    train, held_out = rows(TRAIN_ROWS, 0), rows(HELD_OUT_ROWS, 1)
    seen = "".join(message["content"] for made in train for message in made["messages"])
    for pool, (_, unseen) in POOLS.items():
        for entity in unseen.split("|"):
            if entity in seen:
                raise SystemExit(f"the held-out {pool} {entity!r} occurs in the training text")
    for name, made in (("train", train), ("validation", held_out)):
        with open(FOLDER / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in made)
        print(f"{name}.jsonl: {len(made)} conversations")


if __name__ == "__main__":
    main()
