"""The cast of the Renditions demo: 100 classes and the emoji sets ("styles") that draw them.

Every style draws the same classes, as ImageNet-R holds renditions of ImageNet's classes. Students see only the CLEAN
styles. The teacher has seen all TEACHER styles, as CLIP has seen more of the world than ImageNet. Neither sees the
styles of UNSEEN and SKETCH_UNSEEN.
"""

CLASSES: tuple[str, ...] = tuple(
    """
    ant bear blowfish camel cat-face cow crocodile dog-face dolphin elephant frog honeybee horse koala
    lady-beetle monkey-face octopus penguin pig-face rabbit-face rooster snail snake spider spouting-whale
    tiger turtle tropical-fish spiral-shell cactus mushroom rose sunflower four-leaf-clover palm-tree
    maple-leaf banana birthday-cake bread cherries cookie doughnut french-fries grapes hamburger ice-cream
    lemon lollipop pear pineapple strawberry watermelon wine-glass beer-mug american-football basketball
    soccer-ball bowling artist-palette balloon bell bomb crown electric-plug floppy-disk guitar handbag
    headphone high-heeled-shoe jeans key light-bulb lipstick microphone microscope money-bag necktie
    open-book package saxophone syringe t-shirt television toilet violin wrench airplane alarm-clock anchor
    automobile bicycle helicopter rocket sailboat tent umbrella-with-rain-drops fire crescent-moon ghost
    skull
    """.split()
)

CLEAN = ("twemoji", "noto", "fluent-emoji-flat")
SEEN = ("noto-v1", "openmoji", "fxemoji", "emojione")
UNSEEN = ("emojione-v1", "streamline-emojis")
# fluent-emoji renders the drawings of the clean fluent-emoji-flat in 3-D, so it does not count as UNSEEN
RELATED = ("fluent-emoji",)
SKETCH_SEEN = ("emojione-monotone",)
SKETCH_UNSEEN = ("fluent-emoji-high-contrast",)

TEACHER = CLEAN + SEEN + SKETCH_SEEN
STYLES = TEACHER + UNSEEN + RELATED + SKETCH_UNSEEN

# npm packages of the drawings, pinned; each package's info.json names its licence
PACKAGES: dict[str, str] = {
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "noto": "@iconify-json/noto@1.2.9",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "emojione": "@iconify-json/emojione@1.2.3",
    "emojione-monotone": "@iconify-json/emojione-monotone@1.2.1",
    "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
    "streamline-emojis": "@iconify-json/streamline-emojis@1.2.4",
    "fluent-emoji": "@iconify-json/fluent-emoji@1.2.7",
    "fluent-emoji-high-contrast": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}


def display_name(name: str) -> str:
    """Write a class name as a person does: ``"umbrella-with-rain-drops"`` -> ``"umbrella with rain drops"``."""
    return name.replace("-", " ")
