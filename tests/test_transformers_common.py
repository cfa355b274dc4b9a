# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""transformers' own common tests on our models and configurations.

`TRANSFORMERS_SOURCE=FOLDER` names an unpacked sdist or a checkout of the pinned version; `parameterized` must be there
too. The sdist leaves some of the tests' files out: what they would test (generation among it) is not run then.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
import types
import unittest
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers

from modeling_midivalle import (
    MidiValleARConfig,
    MidiValleARModel,
    MidiValleNARConfig,
    MidiValleNARModel,
    PianoEncodecConfig,
    PianoEncodecModel,
)
from processing import MidiValleProcessor
from tokenization import MidiValleTokenizer

SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", ""))
if not os.environ.get("TRANSFORMERS_SOURCE"):
    pytest.skip("set TRANSFORMERS_SOURCE to the source of the pinned transformers", allow_module_level=True)
if f'__version__ = "{version("transformers")}"' not in (SOURCE / "src" / "transformers" / "__init__.py").read_text():
    pytest.skip(f"TRANSFORMERS_SOURCE is not transformers {version('transformers')}", allow_module_level=True)
if importlib.util.find_spec("parameterized") is None:
    pytest.skip("transformers' tests need the package `parameterized`", allow_module_level=True)

PACKAGE = "transformers_tests"  # its own name, `tests`, is ours
ABSENT = {  # what the sdist leaves out, and what the other files want of it
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def load(name):
    """A module of the source's `tests` folder."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def stand_in(name, **things):
    """A module made of `things`, importable as `name`."""
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(things)


stand_in(PACKAGE, __path__=[str(SOURCE / "tests")])
for name, things in ABSENT.items():
    if not (SOURCE / "tests" / f"{name.replace('.', '/')}.py").is_file():
        stand_in(f"{PACKAGE}.{name.split('.')[0]}", __path__=[])
        stand_in(f"{PACKAGE}.{name}", **things)
if not (SOURCE / "utils" / "fetch_hub_objects_for_ci.py").is_file():
    stand_in("fetch_hub_objects_for_ci", url_to_local_path=str)  # names files to download; we have no use for them
with patch("transformers.utils.direct_transformers_import", lambda *_: transformers):  # wants `tests/__init__.py`
    ConfigTester = load("test_configuration_common").ConfigTester

common = load("test_modeling_common")
GenerationTesterMixin = load("generation.test_utils").GenerationTesterMixin
ProcessorTesterMixin = load("test_processing_common").ProcessorTesterMixin
tokenization_common = load("test_tokenization_common")  # not its mixin alone: pytest would run that


class ARTester:
    """Sizes and inputs, as the common tests ask for them. Attention spans MIDI rows and frames."""

    config_class = MidiValleARConfig
    batch_size, seq_length, rows, is_training = 8, 9, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 2, 2050
    encoder_seq_length = key_length = seq_length + rows

    def get_config(self):
        return self.config_class.from_preset("tiny")

    def prepare_config_and_inputs_for_common(self):
        fields = [torch.randint(4, high, (self.batch_size, self.rows)) for high in (92, 68, 300, 772, 388, 8)]
        inputs = {
            "input_ids": common.ids_tensor([self.batch_size, self.seq_length], 2048),
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long),
            "midi_ids": torch.stack(fields, -1),
            "midi_attention_mask": torch.ones(self.batch_size, self.rows, dtype=torch.long),
            "prompt_lengths": torch.full((self.batch_size,), 3),
        }
        return self.get_config(), inputs


class NARTester(ARTester):
    """A stage of the NAR, all frames at once."""

    config_class = MidiValleNARConfig

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        del inputs["input_ids"]
        return config, {"audio_codes": common.ids_tensor([self.batch_size, 4, self.seq_length], 2048)} | inputs


class DecoderTests:
    """What the tests of both decoders have in common."""

    test_resize_embeddings = False  # codes and MIDI ids are two vocabularies, both fixed
    additional_model_inputs = ["midi_ids", "midi_attention_mask", "prompt_lengths"]

    def setUp(self):
        self.model_tester = self.inputs_class()
        sizes = {"hidden_size": 32, "num_attention_heads": 2}
        config_class = self.model_tester.config_class
        self.config_tester = ConfigTester(self, config_class=config_class, has_text_modality=False, **sizes)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        labels = {"labels": inputs_dict[model_class.main_input_name].clone()} if return_labels else {}
        return dict(inputs_dict) | labels


class TestAR(DecoderTests, common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    """The AR is a causal language model over codes, with MIDI in front."""

    inputs_class = ARTester
    all_model_classes = all_generative_model_classes = (MidiValleARModel,)


class TestNAR(DecoderTests, common.ModelTesterMixin, unittest.TestCase):
    """The NAR does not generate by itself."""

    inputs_class = NARTester
    all_model_classes = (MidiValleNARModel,)


class CodecTester(ARTester):
    """Audio of 0.04 s."""

    config_class = PianoEncodecConfig
    hidden_size, is_training = 16, False  # it returns no loss

    def get_config(self):
        return PianoEncodecConfig(num_filters=2, hidden_size=16, num_lstm_layers=1)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"input_values": common.floats_tensor([self.batch_size, 1, 1280], scale=1.0)}


class TestCodec(common.ModelTesterMixin, unittest.TestCase):
    """As transformers tests its own EnCodec, from which the class derives."""

    all_model_classes = (PianoEncodecModel,)
    is_encoder_decoder = True
    has_attentions = test_resize_embeddings = test_torch_exportable = False

    def setUp(self):
        self.model_tester = CodecTester()
        self.config_tester = ConfigTester(
            self, config_class=PianoEncodecConfig, hidden_size=16, common_properties=[], has_text_modality=False
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        return dict(inputs_dict)

    @unittest.skip("EncodecModel returns no hidden states")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("EncodecModel returns no hidden states")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("EncodecModel.forward refuses output_hidden_states")
    def test_model_outputs_equivalence(self):
        pass

    @unittest.skip("EncodecModel has no input embeddings")
    def test_model_get_set_embeddings(self):
        pass


def tokens(count, pitch=40):
    """A text of `count` MIDI tokens."""
    return " ".join(f"Pitch_{pitch + i}" for i in range(count))


class TestTokenizer(tokenization_common.TokenizerTesterMixin, unittest.TestCase):
    """Texts of MIDI tokens; that of MIDI is in test_tokenization.py."""

    tokenizer_class = MidiValleTokenizer

    @classmethod
    def setUpClass(cls):
        cls.tmpdirname = tempfile.mkdtemp()
        MidiValleTokenizer().save_pretrained(cls.tmpdirname)
        cls.from_pretrained_id = [cls.tmpdirname]
        cls.tokenizers_list = [(MidiValleTokenizer, cls.tmpdirname, {})]

    def get_clean_sequence(self, tokenizer, with_prefix_space=False, max_length=20, min_length=5):
        text = tokens(min(max_length, 20))  # the default takes tokens of letters alone
        return " " * with_prefix_space + text, tokenizer.encode(text, add_special_tokens=False)


class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    """Texts of MIDI tokens and plain audio; that of MIDI with a prompt is in test_processing.py."""

    processor_class = MidiValleProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return MidiValleTokenizer()

    @classmethod
    def _setup_feature_extractor(cls):
        return transformers.EncodecFeatureExtractor(sampling_rate=32_000)

    def prepare_text_inputs(self, batch_size=None, modalities=None):
        return tokens(3) if batch_size is None else [tokens(2 + i % 2) for i in range(batch_size)]
