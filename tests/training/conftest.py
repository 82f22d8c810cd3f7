"""What the tests of this room share."""

import pytest

import finetune


class Prepared(Exception):
    """Carries the trainer of a run that stops before its first step."""


@pytest.fixture
def prepared(monkeypatch):
    """Function from a command line to the RecipeTrainer that would train."""

    def stop(trainer, **options):
        raise Prepared(trainer)

    def of(words):
        with monkeypatch.context() as patch, pytest.raises(Prepared) as stopped:
            patch.setattr(finetune.RecipeTrainer, "train", stop)
            finetune.train(words)
        return stopped.value.args[0]

    return of
