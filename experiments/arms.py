"""Changes that turn DINO into what it is compared with, at any scale; no experiment itself.

The teacher and its momentum stay the baseline's: in a run too short for the published 0.999 of MoCo-v2, all have the
same.
"""

from dino_lab.ablation import Changes, Like

NO_MULTICROP: Changes = {"crops.local_crops_number": 0}

BYOL: Changes = {
    "method.kind": "byol",
    "method.head.hidden_dim": Like("method.head.hidden_dim"),
    "method.predictor.hidden_dim": Like("method.head.hidden_dim"),
}
"""Its projection and its predictor as wide as the baseline's head."""

MOCO: Changes = {
    "method.kind": "moco",
    "method.head.batch_norm": True,
    "method.head.hidden_dim": Like("method.head.hidden_dim"),
    "method.queue_size": Like("method.head.out_dim"),
}
"""With batch normalisation in the projection, as Table 14 counts it, and as many keys as the baseline has prototypes:
on ImageNet 65,536, MoCo's own number."""

PREDICTOR: Changes = {
    "method.predictor.kind": "mlp",
    "method.predictor.hidden_dim": Like("method.head.hidden_dim"),
    "method.predictor.batch_norm": False,
    "method.predictor.small_start": True,
}
"""A student that predicts, and no batch normalisation, as in Table 14's row 3; it starts as the head does."""

SWAV: Changes = {
    "method.kind": "swav",
    "method.head.hidden_dim": Like("method.head.hidden_dim"),
    "method.prototypes_number": Like("method.head.out_dim"),
    "method.freeze_prototypes_epochs": Like("method.head.freeze_last_layer_epochs"),
}
"""With the baseline's number of prototypes."""
