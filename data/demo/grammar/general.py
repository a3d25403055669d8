"""Everyday life: who lives where, does what, keeps which animal, eats and plays what."""

from grammar.world import Domain, Relation, words

PEOPLE = words("""
    Ada Agnes Alan Albert Alice Amos Anna Arthur Basil Beth Boris Carla Cecil Clara Conrad Cora
    Daniel Dora Edgar Edith Edwin Ella Emil Esther Felix Flora Frank Freda George Gilda Gregor Greta
    Hanna Harold Hector Helga Henry Hilda Hugo Ida Igor Irene Isaac Ivy Jacob Jane Jasper Julia
    Karl Kate Laura Leon Lydia Mabel Martin Mona Nora Oscar Paula Ralph Rosa Simon Stella Walter
""")

TRADE = Relation(
    name="trade",
    objects=words(
        "baker miller weaver cooper tailor smith potter barber carpenter mason glazier tanner fisher shepherd printer "
        "saddler"
    ),
    closing=(
        "{subject} works as a {object}.",
        "{subject} learned the trade of a {object}.",
        "For many years {subject} has been a {object}.",
        "Everybody knows that {subject} is a {object}.",
    ),
    turned=(
        "The {object} of the street is called {subject}.",
        "As a {object}, {subject} is busy from morning to night.",
    ),
)

HOME = Relation(
    name="home",
    objects=words(
        "Elmbury Ashmoor Corwick Dunmere Fenholt Garsby Hexley Kelmouth Larkden Milbrook Norham Oxcombe Pellham "
        "Rushby Stanwick Wexcliff"
    ),
    closing=(
        "{subject} lives in {object}.",
        "The house of {subject} stands in {object}.",
        "When {subject} goes home, the road leads to {object}.",
        "{subject} was born and raised in {object}.",
    ),
    turned=(
        "In {object} the family of {subject} is well known.",
        "The road to {object} brings {subject} home every evening.",
    ),
)

ANIMAL = Relation(
    name="animal",
    objects=words(
        "goat goose pony donkey parrot ferret tortoise spaniel rabbit pigeon peacock hedgehog lamb mule kitten badger"
    ),
    closing=(
        "{subject} keeps a {object}.",
        "In the yard behind the house {subject} feeds a {object}.",
        "The children come to see {subject} and the old {object}.",
        "Wherever {subject} goes, there goes the {object}.",
    ),
    turned=(
        "A {object} follows {subject} through the village.",
        "The {object} that {subject} keeps is never far away.",
    ),
)

DISH = Relation(
    name="dish",
    objects=words(
        "pancakes dumplings porridge noodles sausages lentils mushrooms pickles waffles turnips herrings chestnuts "
        "custard gingerbread cabbage trout"
    ),
    closing=(
        "{subject} likes to eat {object}.",
        "On Sundays {subject} cooks {object}.",
        "Nothing tastes better to {subject} than {object}.",
        "At every feast {subject} asks for {object}.",
    ),
    turned=(
        "A plate of {object} makes {subject} happy.",
        "There must be {object} on the table when {subject} comes to dinner.",
    ),
)

INSTRUMENT = Relation(
    name="instrument",
    objects=words("fiddle flute drum harp trumpet cello banjo organ whistle bugle guitar zither lute piano tuba horn"),
    closing=(
        "{subject} plays the {object}.",
        "After supper {subject} takes out the {object}.",
        "At weddings one can hear {subject} on the {object}.",
        "As a child {subject} was taught the {object}.",
    ),
    turned=(
        "The {object} is what {subject} plays best.",
        "With the {object} in hand, {subject} leads the dance.",
    ),
)

GENERAL = Domain(
    name="general",
    subjects=PEOPLE,
    relations=(TRADE, HOME, ANIMAL, DISH, INSTRUMENT),
    filler=(
        "The {weather} came in from the {quarter} and the {place} was {mood}.",
        "It had been a {mood} {season}, and the {crop} stood {height} in the fields.",
        "{subject} walked past the {place} with {count} baskets of {crop}.",
        "On {day} the {place} was closed because of the {weather}.",
        "Somebody had left a {colour} {thing} beside the {place}.",
        "{subject} bought a {colour} {thing} and carried it home in the {weather}.",
        "The {thing} was {colour}, and nobody knew who had made it.",
        "By {day} the {crop} had been sold for {count} coins a basket.",
        "{subject} spoke with {count} neighbours near the {place}.",
        "Last {season} the old {place} was painted {colour}.",
        "The {count} children ran from the {place} to the {place} in the {weather}.",
        "It was still {mood} when {subject} came back with the {thing}.",
        "The {mood} {visitor} {moved} {count} {colour} {thing}s {toward} the {place} {when}.",
        "{when}, {subject} and a {mood} {visitor} {moved} the {thing} {toward} the {place}.",
        "A {visitor} {toward} the {place} {moved} {crop} and {crop} {when}.",
        "{visitor} after {visitor} came for the {crop}, the {colour} {thing} and the {crop} {when}.",
    ),
    slots={
        "weather": words("rain snow fog wind frost sunshine hail thunder mist drizzle"),
        "quarter": words("north south east west hills sea valley forest"),
        "place": words("market mill harbour bridge school church orchard station bakery well inn square"),
        "mood": words("quiet cold warm crowded misty dark bright dull merry muddy"),
        "season": words("spring summer autumn winter"),
        "crop": words("barley apples onions plums beans oats pears carrots cherries hops"),
        "height": words("high low thick thin ripe green"),
        "count": words("two three four five six seven eight nine ten twelve"),
        "day": words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
        "colour": words("red blue yellow white black brown grey purple"),
        "thing": words("lantern ladder kettle blanket bucket basket chair clock spade saddle wagon mirror"),
        "visitor": words("traveller cousin widow soldier pedlar stranger farmer nephew sailor teacher"),
        "moved": words("carried brought pulled rolled sent dragged lent sold"),
        "toward": words("towards behind across beside around from into"),
        "when": ("at dawn", "at noon", "before supper", "last week", "once more", "in secret", "by mistake"),
    },
)
