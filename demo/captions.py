"""The words: ten classes with their synonyms, ten scenes, the scene that takes each class's place, and prompts of them.

It does not know images or tensors.
"""

from __future__ import annotations

SYNONYMS: dict[str, tuple[str, ...]] = {
    "airplane": ("aircraft", "plane", "jet"),
    "automobile": ("car", "vehicle", "motorcar"),
    "bird": ("avian", "birdie", "fowl"),
    "cat": ("kitty", "feline", "housecat"),
    "deer": ("doe", "stag", "fawn"),
    "dog": ("puppy", "hound", "canine"),
    "frog": ("toad", "amphibian", "bullfrog"),
    "horse": ("pony", "stallion", "mare"),
    "ship": ("boat", "vessel", "ferry"),
    "truck": ("lorry", "van", "pickup"),
}

CLASSES: tuple[str, ...] = tuple(SYNONYMS)

SCENES: tuple[str, ...] = (
    "street",
    "forest",
    "sea",
    "sky",
    "field",
    "desert",
    "beach",
    "night",
    "snow",
    "ground",
)

TEMPLATES: tuple[str, ...] = (
    "a photo of the {}",
    "a photo of a {}",
    "a picture of a {}",
    "a picture of the {}",
    "a {}",
    "the {}",
    "{}",
)

# scene -> how an object is said to be in it
PLACES: dict[str, str] = {
    "street": "on the street",
    "forest": "in the forest",
    "sea": "on the sea",
    "sky": "in the sky",
    "field": "in the field",
    "desert": "in the desert",
    "beach": "on the beach",
    "night": "at night",
    "snow": "in the snow",
    "ground": "on the ground",
}

REFERENCES: dict[str, str] = {
    "airplane": "sea",
    "automobile": "beach",
    "bird": "beach",
    "cat": "forest",
    "deer": "sea",
    "dog": "field",
    "frog": "snow",
    "horse": "night",
    "ship": "ground",
    "truck": "sky",
}
"""The scene whose prediction takes the place of each class where it is erased."""


def article(word: str) -> str:
    """Returns "a" or "an" as the word asks for it."""
    return "an" if word[0] in "aeiou" else "a"


def fill(template: str, word: str) -> str:
    """Returns the template with the word in it, "a" made "an" where the word needs it."""
    return template.replace("a {}", f"{article(word)} {{}}").format(word)


def words_for(klass: str) -> tuple[str, ...]:
    """Returns the class name followed by its synonyms."""
    return (klass, *SYNONYMS[klass])


def photo(word: str) -> str:
    """Returns the prompt that erasure is trained and measured with."""
    return f"a photo of the {word}"


def placed(word: str, scene: str) -> str:
    """Returns the prompt of an object in a scene."""
    return f"{article(word)} {word} {PLACES[scene]}"


def all_captions(klass: str | None, scene: str | None) -> list[str]:
    """Returns every caption that describes an object, a scene, or an object in a scene."""
    if klass is None:
        if scene is None:
            return [""]
        return [fill(t, scene) for t in TEMPLATES]
    objects = [fill(t, word) for word in words_for(klass) for t in TEMPLATES]
    if scene is None:
        return objects
    place = PLACES[scene]
    preposition = place.split()[0]
    variants = {place, f"{preposition} {article(scene)} {scene}", f"in the {scene}", f"in {scene}"}
    return [f"{o} {v}" for o in objects for v in sorted(variants)]
