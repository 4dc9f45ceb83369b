"""What the command line takes a misspelt word for."""

import pytest

from tinyvit.cli import main


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("eval run --data shapes --jsno", "eval does not know --jsno; did you mean --json?"),
        ("train --no-augmnt", "train does not know --no-augmnt; did you mean --no-augment?"),
        ("train --no_augment", "train does not know --no_augment; did you mean --no-augment?"),
        ("train --foo", "train does not know --foo"),
        ("predict run a.png --ckpt", "predict does not know --ckpt"),
        ("train --optimizer adamW", "got 'adamW'; did you mean adamw?"),
        ("--foo evaluate run --data shapes", "models or info, got 'evaluate'; did you mean eval?"),
        ("train --optimizer=", "got ''"),
    ],
)
def test_what_is_like_a_known_word_is_taken_for_it_and_nothing_else(line, end, capsys):
    assert main(line.split()) == 2
    assert capsys.readouterr().err.endswith(f"{end}\n")
