# Copyright 2026 The MIDI-VALLE for Hugging Face authors. Apache-2.0.
"""transformers' own common tests on our models, configurations, tokenizer and processor.

`TRANSFORMERS_SOURCE=FOLDER` names an unpacked sdist or a checkout of the pinned version; `parameterized` must be there
too. The sdist leaves some of the tests' files out, generation among them: what they would test is in
test_generation_mixin.py. A case that the suites skip fails here unless `SKIP_REASONS` says why (see conftest.py).
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

SKIP_REASONS = {  # what transformers says -> why it is so here
    "requires (multiple )?accelerator|requires Flash Attention|requires the kernels library": "needs a GPU",
    "requires deepspeed": "deepspeed is not used",
    "tests/generation|exporters": "the sdist lacks this file: set TRANSFORMERS_SOURCE to a checkout",
    "slow": "downloads, or needs minutes",
    "no `base_model_class`|sliding window|position embeddings": "positions are seconds: no RoPE to scale, no window",
    "test_resize_embeddings": "codes and MIDI ids are two vocabularies, both fixed",
    "use `inputs_embeds`": "codes come with their places among MIDI rows: vectors alone do not tell them",
    "[Ss]tateful models": "assisted decoding cuts caches and outputs by frames; MIDI rows stand before those",
    "TP plan": "371 million parameters at most: nothing to be spread over devices",
    "grouped_mm|sparse experts|router_logits": "there are no experts",
    "[Cc]omposite|subconfigs|support SDPA": "each is one model; the whole is in test_hub_round_trip.py and others",
    "No conversion found": "keys are saved as they are named",
    "_keep_in_fp32_modules": "only the whole model keeps a part, the codec, in fp32",
    "decoder-only language modeling|sequence-to-sequence": "only the AR is a language model; it shifts its labels",
    "Codec.*(support attentions|output_attentions|output attentions|don't support sdpa)": "convolutions and an LSTM",
    "Codec.*(hidden[_ ]states|capture_outputs|input embeddings)": "EncodecModel, from which it derives, has none",
    "Codec.*not configured to run training": "it returns no loss; scripts.train_codec has its objectives",
    "chat template|Torchcodec": "a performance is no conversation",
    "image_processor|video_processor|images with text": "there are no images or films",
    "_get_num_multimodal_tokens": "texts of MIDI tokens have no places for other inputs",
    "[Bb]ackend tokenizer": "it is a tokenizer in Python: its parent is PreTrainedTokenizer",
    "bc_cache_name|Do not take a cache": "there is none, or it has both names, and neither is deprecated",
    "No integration expected": "fixed ids of fixed MIDI are in test_tokenization.py",
}

PACKAGE = "transformers_tests"  # its own name, `tests`, is ours
ABSENT = {  # what the sdist leaves out, and what the other files want of it
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {"__module__": __name__})},
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
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["midivalle_ar"] = "MidiValleARModel"  # what it is, it is told by name
TrainingTesterMixin = load("test_training_mixin").TrainingTesterMixin
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


class TestAR(DecoderTests, common.ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """The AR is a causal language model over codes. Its MIDI rows stand in front, wherever places are counted."""

    inputs_class = ARTester
    all_model_classes = all_generative_model_classes = (MidiValleARModel,)

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        del inputs["prompt_lengths"]  # one axis; a test cuts every input on two
        return config, inputs

    def _check_generate_outputs(self, *args, **kwargs):
        with patch.object(self.model_tester, "encoder_seq_length", ARTester.seq_length):
            super()._check_generate_outputs(*args, **kwargs)

    def _check_attentions_for_generate(self, batch_size, attentions, *args, **kwargs):
        rows, cache = ARTester.rows, kwargs["decoder_past_key_values"]
        first = 0 if isinstance(cache, transformers.StaticCache) else rows  # of a static cache it counts all places
        steps = (tuple(layer[:, :, rows * (layer.shape[2] > 1) :, first:] for layer in step) for step in attentions)
        super()._check_attentions_for_generate(batch_size, tuple(steps), *args, **kwargs)

    def _check_hidden_states_for_generate(self, batch_size, hidden_states, *args, **kwargs):
        rows = ARTester.rows
        steps = (tuple(layer[:, rows * (layer.shape[1] > 1) :] for layer in step) for step in hidden_states)
        super()._check_hidden_states_for_generate(batch_size, tuple(steps), *args, **kwargs)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        super()._check_past_key_values_for_generate(batch_size, past_key_values, seq_length + ARTester.rows, config)

    @unittest.skip("wants a warning of the name before 5.24")
    def test_bc_cache_name_forward(self):
        pass

    @pytest.mark.skipif(GenerationTesterMixin.__module__ == __name__, reason="tests/generation is not there")
    def test_generation_suite_is_there(self):
        assert [name for name in dir(self) if name.startswith("test_greedy_generate")]


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
    has_attentions = test_resize_embeddings = test_torch_exportable = False  # how long it is depends on its data

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
