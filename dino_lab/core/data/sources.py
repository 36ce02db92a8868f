"""Data sets by their kind."""

from typing import Annotated, TypeAlias

from pydantic import Field

from dino_lab.core.data.downloads import CIFAR10, CIFAR100, STL10, FashionMNIST
from dino_lab.core.data.embedded import Digits, Shapes
from dino_lab.core.data.folder import ImageFolder
from dino_lab.core.data.hub import HuggingFace
from dino_lab.core.data.shards import WebDataset
from dino_lab.core.data.voc import PascalVOC

__all__ = ["AnyData", "DataSettings", "Shapes"]

AnyData: TypeAlias = (
    Shapes | Digits | FashionMNIST | CIFAR10 | CIFAR100 | STL10 | ImageFolder | HuggingFace | WebDataset | PascalVOC
)
DataSettings: TypeAlias = Annotated[AnyData, Field(discriminator="kind")]
