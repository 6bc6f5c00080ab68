"""Arguments that are out of their range are named."""

import pytest

from anomalib_decad.components import (
    AdversarialSynthesis,
    DecouplerOptions,
    DecouplingLossOptions,
    EmbeddingDecoupling,
    InvertibleOptions,
    SynthesisOptions,
)
from anomalib_decad.models.decad import AnomalyMapOptions

WRONG = {
    InvertibleOptions: {"num_blocks": 0, "num_units": 0, "hidden_dim": 0, "lipschitz": 1.0, "pila_k": 0.0},
    SynthesisOptions: {"fraction": -0.1, "num_steps": -1, "noise": "x", "blob_size": 0},
    DecouplerOptions: {"abnormal_fraction": 1, "num_prototypes": -1},
    DecouplingLossOptions: {"margin": 0, "normal_weight": -1},
    AnomalyMapOptions: {"blur_sigma": -1, "score_fraction": 1.5, "energy_power": -1},
    AdversarialSynthesis: {"delta": 0},
}


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, values in WRONG.items() for name in values])
def test_a_wrong_value_is_refused_by_its_name(cls, name):
    with pytest.raises(ValueError, match=f"{name} must"):
        cls(**{name: WRONG[cls][name]})


def test_groups_are_checked_with_the_number_of_channels():
    with pytest.raises(ValueError, match="abnormal_fraction must leave channels to both"):
        EmbeddingDecoupling(8, decoupler=DecouplerOptions(abnormal_fraction=0.01, num_prototypes=0))
