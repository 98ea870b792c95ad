"""Few-shot adaptation: an initialization that was learned from other digits adapts to new ones from five samples each.

    python examples/few_shot_adaptation.py

learns an initialization with Reptile on simulated clients, lets 100 new devices adapt to digits that none of the
clients ever saw, and prints

    accuracy after 5 samples a class: learned 0.00, from scratch 0.00
"""

import numpy as np

from tinyfleet import MoteLearner
