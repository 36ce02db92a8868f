"""What is trained: each method is a loss and what happens after a step."""

from typing import Annotated, TypeAlias

from pydantic import Field

from dino_lab.core.methods.byol import BYOL
from dino_lab.core.methods.dino import DINO
from dino_lab.core.methods.distillation import Distillation
from dino_lab.core.methods.mae import MAE
from dino_lab.core.methods.masked import Masked
from dino_lab.core.methods.moco import MoCo
from dino_lab.core.methods.supervised import Supervised
from dino_lab.core.methods.swav import SwAV

MethodSettings: TypeAlias = Annotated[
    DINO | BYOL | MoCo | SwAV | Supervised | Distillation | MAE | Masked, Field(discriminator="kind")
]
