//! Properties of the readers: whatever they are given, they answer, with little memory.
//!
//! `tests/interop_fuzz.rs` damages whole checkpoints; here each reader is on its own.

use proptest::collection::vec;
use proptest::prelude::*;

use super::pickle::state_dict;
use super::zip::Zip;
use super::{config, names, safetensors, source, tensor, torch};

/// Instructions of a pickle, with operands that make sense as often as not.
fn instruction() -> impl Strategy<Value = Vec<u8>> {
    let global = prop_oneof![
        Just("collections\nOrderedDict\n"),
        Just("torch._utils\n_rebuild_tensor_v2\n"),
        Just("torch._utils\n_rebuild_parameter\n"),
        Just("torch\nFloatStorage\n"),
        Just("torch.storage\nUntypedStorage\n"),
        Just("os\nsystem\n"),
    ];
    let text = prop_oneof![
        Just("storage"),
        Just("0"),
        Just("lm_head.weight"),
        Just("cpu")
    ];
    let with = |opcode: u8, operand: Vec<u8>| [vec![opcode], operand].concat();
    prop_oneof![
        4 => prop::sample::select(b"()}]tusaebRQN.\x85\x86\x87\x88\x89\x93\x94".to_vec())
            .prop_map(|opcode| vec![opcode]),
        2 => global.prop_map(move |name| with(b'c', name.as_bytes().to_vec())),
        2 => text.prop_map(move |text| {
            let length = (text.len() as u32).to_le_bytes();
            with(b'X', [&length[..], text.as_bytes()].concat())
        }),
        1 => (0u8..4).prop_map(move |slot| with(b'q', vec![slot])),
        1 => (0u8..4).prop_map(move |slot| with(b'h', vec![slot])),
        1 => any::<[u8; 4]>().prop_map(move |number| with(b'J', number.to_vec())),
        1 => any::<u8>().prop_map(move |number| with(b'K', vec![number])),
        1 => (0u8..12).prop_map(move |count| with(0x8a, vec![count])),
        1 => any::<[u8; 9]>().prop_map(|bytes| bytes.to_vec()),
    ]
}

/// A tensor's description with operands out of everywhere, as a state dict of one entry.
fn one_tensor(offset: i64, shape: &[i64], strides: &[i64], class: &str) -> Vec<u8> {
    let text = |text: &str| {
        let length = (text.len() as u32).to_le_bytes();
        [b"X", &length[..], text.as_bytes()].concat()
    };
    let integer = |number: i64| [&[0x8a, 8][..], &number.to_le_bytes()].concat();
    let tuple = |numbers: &[i64]| {
        let items: Vec<u8> = numbers.iter().flat_map(|it| integer(*it)).collect();
        [b"(", &items[..], b"t"].concat()
    };
    [
        b"\x80\x02}".to_vec(),
        text("lm_head.weight"),
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        format!("ctorch\n{class}\n").into_bytes(),
        text("0"),
        text("cpu"),
        integer(1),
        b"tQ".to_vec(),
        integer(offset),
        tuple(shape),
        tuple(strides),
        b"\x89NtRs.".to_vec(),
    ]
    .concat()
}

/// The length of its header may begin as an old pickle does.
#[test]
fn a_safetensors_file_is_known_by_its_header() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    for length in [0x0180u64, 0x0280, 0x0580] {
        let header = format!("{:1$}", "{}", length as usize);
        let file = [&length.to_le_bytes()[..], header.as_bytes()].concat();
        std::fs::write(&path, file).expect("a file");
        let source = source::Source::open(&path).expect("a file without tensors");
        assert!(source.tensors.is_empty());
    }
    std::fs::write(&path, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P").expect("a file");
    let error = source::Source::open(&path).expect_err("an old pickle");
    assert!(error.to_string().contains("before 1.6"), "{error}");
}

proptest! {
    #[test]
    fn any_bytes_are_answered(bytes in vec(any::<u8>(), 0..2000)) {
        let _ = state_dict(&bytes);
        let _ = Zip::open(&bytes.as_slice());
        let _ = torch::tensors(&bytes.as_slice(), 0);
        let _ = safetensors::tensors(&bytes.as_slice(), 0);
        let _ = config::json(&bytes);
        let _ = config::yaml(&bytes, Some(4));
        let _ = source::weight_map(&bytes);
    }

    #[test]
    fn any_program_is_answered(program in vec(instruction(), 0..200)) {
        let _ = state_dict(&program.concat());
    }

    #[test]
    fn a_tensor_is_what_its_description_says_or_an_error(
        offset in any::<i64>(),
        shape in vec(prop_oneof![0..5i64, any::<i64>()], 0..10),
        class in prop::sample::select(vec!["FloatStorage", "HalfStorage", "LongStorage", "Nothing"]),
    ) {
        let good = offset >= 0
            && shape.iter().all(|length| *length >= 0)
            && shape.len() <= 8
            && class != "Nothing";
        let found = state_dict(&one_tensor(offset, &shape, &shape, class));
        prop_assert_eq!(found.is_ok(), good, "{:?}", found);
        if let Ok(found) = found {
            prop_assert_eq!(&found[0].0, "lm_head.weight");
            prop_assert_eq!(found[0].1.offset as i64, offset);
            prop_assert_eq!(found[0].1.shape.len(), shape.len());
        }
    }

    #[test]
    fn no_header_of_safetensors_leads_outside_the_file(
        from in any::<u64>(),
        to in any::<u64>(),
        shape in vec(prop_oneof![0..9u64, any::<u64>()], 0..4),
        dtype in prop::sample::select(vec!["F32", "BF16", "I64", "F4"]),
        close in any::<bool>(),
    ) {
        // Half of the places are near the file's.
        let (from, to) = if close { (from % 40, to % 40) } else { (from, to) };
        let header = serde_json::json!({
            "__metadata__": {"format": "pt"},
            "a": {"dtype": dtype, "shape": shape, "data_offsets": [from, to]},
        })
        .to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 32]);
        if let Ok(found) = safetensors::tensors(&bytes.as_slice(), 0) {
            prop_assert!(found[0].offset + found[0].bytes() <= bytes.len() as u64);
            let _ = found[0].values(&bytes.as_slice());
        }
    }

    #[test]
    fn any_json_is_answered(
        key in prop::sample::select(vec![
            "d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "tie_embeddings",
            "hidden_size", "expand", "intermediate_size", "attn_layer_idx", "weight_map",
        ]),
        value in prop::sample::select(vec![
            "null", "-1", "1e400", "18446744073709551615", "\"x\"", "[]", "[1]", "{}", "true", "0",
            "{\"layer\": 3}", "{\"a\": \"../b\"}", "{\"a\": 5}", "1.5",
        ]),
    ) {
        let text = format!("{{\"{key}\": {value}, \"hidden_act\": \"silu\"}}");
        let _ = config::json(text.as_bytes());
        let _ = source::weight_map(text.as_bytes());
    }

    #[test]
    fn transposing_twice_changes_nothing(rows in 1..70usize, columns in 1..70usize) {
        let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
        let there = tensor::transposed(&values, columns);
        prop_assert_eq!(there[rows - 1], values[(rows - 1) * columns]);
        prop_assert_eq!(tensor::transposed(&there, rows), values);
    }
}

#[test]
fn a_value_nested_a_million_times_is_no_problem() {
    let program = [b")".to_vec(), vec![0x85; 1 << 20], b".".to_vec()].concat();
    let error = state_dict(&program).expect_err("no dictionary");
    assert!(error.contains("not a dictionary"), "{error}");
    // A dictionary that contains itself.
    let _ = state_dict(b"}q\x00X\x01\x00\x00\x00ah\x00s.");
}

#[test]
fn what_is_refused_is_named() {
    for (program, words) in [
        (&b"cos\nsystem\n(X\x02\x00\x00\x00lstR."[..], "`os.system`"),
        (b"cbuiltins\neval\n.", "`builtins.eval`"),
        (b"ctorch\nload\n.", "`torch.load`"),
        (b"ios\nsystem\n.", "0x69"),
        (b"}P0\n.", "0x50"),
        (b"cos\x1b[31m\nsystem\n.", "os?[31m"),
    ] {
        let error = state_dict(program).expect_err("a hostile pickle");
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn names_of_other_programs_are_ours() {
    for (foreign, expected) in [
        ("backbone.embedding.weight", Some("embedding.weight")),
        (
            "module.backbone.embeddings.weight",
            Some("embedding.weight"),
        ),
        ("mambabyte.token_embedding.weight", Some("embedding.weight")),
        (
            "_orig_mod.mambabyte.final_norm.bias",
            Some("backbone.norm_f.bias"),
        ),
        ("module._orig_mod.lm_head.weight", Some("lm_head.weight")),
        (
            "backbone.layers.7._orig_mod.mixer.A_log",
            Some("backbone.layers.7.mixer.a_log"),
        ),
        ("layers.0.mixer.D", Some("backbone.layers.0.mixer.d")),
        ("backbone.layers.x.mixer.D", None),
        ("lm_head.bias", None),
        ("", None),
        ("backbone", None),
    ] {
        assert_eq!(names::ours(foreign).as_deref(), expected, "{foreign}");
    }
}

#[test]
fn every_parameter_has_a_name_elsewhere_and_comes_back() {
    let mut model = crate::config::MambaConfig::new(32, 3);
    model.bias = true;
    for parameter in model.parameter_table() {
        for foreign in [
            names::mamba_ssm(&parameter.name),
            names::transformers(&parameter.name),
        ] {
            assert_eq!(names::ours(&foreign), Some(parameter.name.clone()));
        }
    }
}

#[test]
fn both_forms_of_a_config_are_read() {
    let released = br#"{"d_model":1792,"n_layer":48,"vocab_size":256,"ssm_cfg":{"expand":2},
        "rms_norm":false,"residual_in_fp32":true,"fused_add_norm":true,
        "pad_vocab_size_multiple":8,"tie_embeddings":false}"#;
    let found = config::json(released).expect("a config");
    assert_eq!((found.width, found.layers), (Some(1792), Some(48)));
    assert_eq!((found.rms_norm, found.tied), (Some(false), Some(false)));
    let hf = br#"{"hidden_size":768,"num_hidden_layers":24,"vocab_size":50280,"state_size":16,
        "conv_kernel":4,"expand":2,"intermediate_size":1536,"time_step_rank":48,"use_bias":false,
        "use_conv_bias":true,"layer_norm_epsilon":1e-05,"hidden_act":"silu","model_type":"mamba"}"#;
    let found = config::json(hf).expect("a config");
    assert_eq!((found.width, found.rank), (Some(768), Some(48)));
    assert_eq!((found.bias, found.epsilon), (Some(false), Some(1e-5)));
    for refused in [
        r#"{"ssm_cfg":{"layer":"Mamba2"}}"#,
        r#"{"hidden_size":8,"model_type":"mamba2"}"#,
        r#"{"architectures":["Mamba2ForCausalLM"]}"#,
    ] {
        let error = config::json(refused.as_bytes()).expect_err(refused);
        assert!(error.contains("Mamba-2"), "{error}");
    }
    // All problems at once.
    let error = config::json(br#"{"d_model":"x","n_layer":-1,"attn_layer_idx":[1]}"#)
        .expect_err("three problems");
    for key in ["d_model", "n_layer", "attn_layer_idx"] {
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn the_authors_yaml_has_two_sizes() {
    let text = b"general:\n  device: auto\nmodel:\n  common:\n    vocab_size: 256 # bytes\n    \
        norm_eps: 1e-5\n  353M:\n    d_model: 1024\n    num_layers: 53\n  972M:\n    \
        d_model: 1792\n    num_layers: 48\n    expand: 2\n";
    let found = config::yaml(text, Some(1792)).expect("a config");
    assert_eq!((found.layers, found.expand), (Some(48), Some(2)));
    assert_eq!((found.vocabulary, found.epsilon), (Some(256), Some(1e-5)));
    let found = config::yaml(text, Some(1024)).expect("a config");
    assert_eq!(found.layers, Some(53));
    let error = config::yaml(text, Some(77)).expect_err("no such width");
    assert!(error.contains("353M") && error.contains("77"), "{error}");
}
