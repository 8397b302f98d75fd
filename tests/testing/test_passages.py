import hashlib

import pytest

from prfaas_jax.errors import InvalidInput
from prfaas_jax.testing import passages


def test_hamlet_is_the_text_that_perplexities_refer_to():
    text = passages.hamlet()
    assert text.startswith("ACT I.\n")
    assert hashlib.sha256(text.encode()).hexdigest() == "fdfe4187fe8bb41f94236085e45a93c9af3762c375549acdaf15967ca1302e39"


def test_persuasion_is_the_text_that_codecs_were_judged_by():
    text = passages.persuasion()
    assert text.startswith("Chapter 1\n")
    assert hashlib.sha256(text.encode()).hexdigest() == "4723199f8fb39be7039bb0efe37ea239793e504caf9fa9c0ec7c080340de3762"


def test_a_missing_text_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(passages, "TEXTS", tmp_path)
    with pytest.raises(InvalidInput, match=r"hamlet_excerpt\.txt"):
        passages.hamlet()
