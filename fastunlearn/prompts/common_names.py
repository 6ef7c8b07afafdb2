"""Names that most models know: what a run that names nothing to keep chooses its neighbours from.

One name for one thing: a synonym of something that is erased must not be held. A model that splits a name into pieces
does not get it, so rare names cost nothing here.
"""

from __future__ import annotations

ANIMALS = (
    "dog", "cat", "horse", "cow", "sheep", "pig", "goat", "rabbit", "mouse", "squirrel", "fox", "wolf", "bear", "deer",
    "lion", "tiger", "elephant", "giraffe", "zebra", "monkey", "panda", "kangaroo", "camel", "hedgehog", "bat",
    "bird", "owl", "eagle", "duck", "chicken", "penguin", "parrot", "swan", "peacock", "flamingo",
    "fish", "shark", "whale", "dolphin", "octopus", "crab", "turtle", "frog", "snake", "lizard", "crocodile", "snail",
    "butterfly", "bee", "spider", "ant", "dragonfly", "ladybug", "dragon", "unicorn", "dinosaur", "robot",
)  # fmt: skip
PLANTS_AND_FOOD = (
    "tree", "flower", "rose", "tulip", "sunflower", "cactus", "palm", "leaf", "mushroom", "grass", "pumpkin",
    "apple", "banana", "orange", "lemon", "pear", "cherry", "strawberry", "grape", "pineapple", "watermelon", "peach",
    "carrot", "tomato", "potato", "corn", "onion", "pepper", "bread", "cheese", "egg", "pizza", "burger", "cake", "pie",
    "cookie", "donut", "ice cream", "candy", "sandwich", "soup", "coffee", "wine",
)  # fmt: skip
VEHICLES = (
    "car", "truck", "bus", "train", "tram", "bicycle", "motorcycle", "tractor", "van", "taxi", "airplane", "helicopter",
    "rocket", "balloon", "kite", "ship", "boat", "sailboat", "canoe", "submarine", "tank", "skateboard", "wagon",
)  # fmt: skip
PLACES = (
    "house", "castle", "church", "tower", "bridge", "lighthouse", "barn", "tent", "windmill", "temple", "skyscraper",
    "fence", "door", "window", "fountain", "statue", "street", "city", "village", "garden", "park",
    "mountain", "volcano", "river", "lake", "waterfall", "beach", "island", "forest", "desert", "cave",
    "sun", "moon", "star", "cloud", "rainbow", "planet", "snowman", "fire",
)  # fmt: skip
HOUSEHOLD = (
    "chair", "table", "sofa", "bed", "lamp", "candle", "lantern", "clock", "watch", "mirror", "vase", "bottle", "cup",
    "mug", "teapot", "kettle", "bowl", "plate", "jar", "basket", "bucket", "box", "bag", "suitcase", "umbrella",
    "book", "pencil", "scissors", "key", "lock", "bell", "ladder", "hammer", "axe", "sword", "shield", "anchor",
    "telephone", "television", "computer", "laptop", "camera", "radio", "guitar", "piano", "violin", "drum", "trumpet",
    "ball", "dice", "doll", "trophy", "coin", "diamond", "crown", "ring", "gift", "heart", "flag", "arrow", "gear",
    "hat", "shirt", "dress", "jacket", "shoe", "boot", "sock", "glove", "scarf", "tie", "backpack", "glasses",
)  # fmt: skip
PEOPLE = (
    "man", "woman", "boy", "girl", "baby", "old man", "old woman", "king", "queen", "knight", "soldier", "pirate",
    "wizard", "clown", "doctor", "chef", "farmer", "police officer", "dancer", "astronaut",
)  # fmt: skip
THINGS = (*ANIMALS, *PLANTS_AND_FOOD, *VEHICLES, *PLACES, *HOUSEHOLD, *PEOPLE)
STYLES = tuple(
    f"{word} style"
    for word in (
        "watercolor", "oil painting", "sketch", "pencil", "charcoal", "ink", "chalk", "crayon", "pastel", "gouache",
        "cartoon", "comic", "anime", "manga", "pixel", "pixel art", "line art", "flat", "vector", "poster",
        "woodcut", "engraving", "etching", "linocut", "stencil", "graffiti", "mosaic", "stained glass", "origami",
        "paper", "felt", "clay", "wood", "marble", "bronze", "glass", "embroidery", "knitted",
        "impressionism", "cubism", "surrealism", "expressionism", "minimalist", "abstract", "baroque", "gothic",
        "renaissance", "rococo", "art deco", "art nouveau", "pop art", "popart", "ukiyo-e", "pointillism",
        "vintage", "retro", "noir", "sepia", "monochrome", "neon", "cyberpunk", "steampunk", "vaporwave",
        "blueprint", "low poly", "isometric", "fantasy", "glitch", "psychedelic", "silhouette", "sticker", "emboss",
        "thermal", "duotone", "xray", "halftone", "crosshatch", "stipple", "wireframe", "hologram", "plush", "brick",
        "quilt", "sand", "ice", "gold", "metal", "plastic", "smoke",
    )
)  # fmt: skip
