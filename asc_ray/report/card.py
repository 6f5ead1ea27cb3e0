"""The model card of a bundle, in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asc_ray.embedded.figures import CForm, figure_rows
from asc_ray.evaluation.scores import Evaluation
from asc_ray.report.forms import FormRow, card_rows
from asc_ray.report.page import environment
from asc_ray.students.tflite import TFLiteForm


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card shows.

    `bytes` is by dtype; `peak_activations` are bytes as int8, None where they were not counted; `splits` has the number
    of clips and of places by split; `license` is empty where none was given; `scores` are the bundle's on the test
    split; `validation` is macro accuracy in [0, 1].
    """

    title: str
    version: str
    network: str
    labels: Sequence[str]
    sample_rate: int
    input: Sequence[int]
    parameters: int
    macs: int
    bytes: Mapping[str, int]
    peak_activations: int | None
    file_bytes: int
    scores: Evaluation
    float_scores: Evaluation | None
    unseen: Sequence[str]
    validation: float
    agreement: Mapping[str, float]
    corpus: str
    corpus_notes: Sequence[str]
    splits: Mapping[str, tuple[int, int]]
    fingerprint: str
    recipe: str  # YAML
    license: str
    lineage: Mapping[str, str]
    operators: Sequence[tuple[str, str, int]]
    c_form: CForm | None = None
    tflite_form: TFLiteForm | None = None

    @property
    def forms(self) -> list[FormRow]:
        return card_rows(
            self.bytes, self.peak_activations, self.file_bytes, self.agreement, self.c_form, self.tflite_form
        )

    @property
    def c_rows(self) -> list[tuple[str, str]]:
        return figure_rows(self.c_form) if self.c_form else []


def render_card(card: Card) -> str:
    return environment().get_template("card.md.j2").render(card=card)
