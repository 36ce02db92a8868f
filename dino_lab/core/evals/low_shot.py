"""Low-shot classification: what frozen features are worth where few images have labels."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from dino_lab.core.evals.classes import first_of_each
from dino_lab.core.settings import Settings


class LowShot(Settings):
    """Logistic regression on l2-normalised features of a fraction of the labelled images.

    Source: MSN (arXiv:2204.07141), section 5.1, for the protocol; scikit-learn's solver.
    """

    fractions: tuple[float, ...] = Field(default=(0.01, 0.1), min_length=1)
    """Parts of the labelled images that are used, the same of each class, at least one image of each."""
    penalty: float = Field(default=0.1, gt=0)
    """Weight of half the squared norm of the classifier beside the sum of losses: scikit-learn's 1 / C."""

    def top1(
        self,
        train: Float[Tensor, "N D"],
        labels: Int64[Tensor, "N"],
        test: Float[Tensor, "M D"],
        test_labels: Int64[Tensor, "M"],
    ) -> dict[float, float]:
        """Percent of test images that are classified rightly, by fraction.

        A smaller part is part of a larger one: the first images of each class. Of a single class there is nothing to
        learn: all are called by it.
        """
        from sklearn.linear_model import LogisticRegression  # here, since planning a sweep need not wait for it

        results = {}
        queries = F.normalize(test, dim=-1).numpy()
        for fraction in self.fractions:
            places = chosen(labels, fraction)
            if len(labels[places].unique()) == 1:
                predicted = labels[places][:1].expand(len(test_labels))
            else:
                classifier = LogisticRegression(C=1 / self.penalty, max_iter=1000)
                classifier.fit(F.normalize(train[places], dim=-1).numpy(), labels[places].numpy())
                predicted = torch.from_numpy(classifier.predict(queries))
            results[fraction] = 100 * float((predicted == test_labels).float().mean())
        return results


def chosen(labels: Int64[Tensor, "N"], fraction: float) -> Int64[Tensor, "n"]:
    """Places of the first images of each class: this part of them, rounded, and at least one."""
    return first_of_each(labels, (fraction * torch.bincount(labels)).round().long().clamp(min=1))
