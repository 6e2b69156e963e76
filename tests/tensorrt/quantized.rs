//! Quantized weights in engines: every kind of codes builds in every form and mode, and embedded weights stay codes.

use lapidary::backend::tensorrt::{self, BuildOptions};
use lapidary::graph::{Constant, Graph};
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{LowerOptions, QuantizedForm, lower};
use lapidary::network::{Profile, WeightMode};
use lapidary::spec::Spec;
use lapidary::tensor::DType;
use lapidary::tensor::quantized::Granularity;

use crate::net::{bytes_of, library};

/// Codes of the matrices of a decoder's layers.
#[derive(Clone, Copy, Debug)]
struct Codes {
    dtype: DType,
    granularity: Granularity,
    zeros: bool,
}

fn decoder(codes: Option<Codes>) -> Graph {
    let decoder = Decoder {
        layers: 1,
        hidden: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        ffn: 1024,
        dtype: DType::F16,
        ..Decoder::tiny()
    };
    let mut count = 0;
    decoder.graph_with(|name, dtype, shape| {
        count += 1;
        // Finite values in every dtype, and no two equal weights, since TensorRT would store them once.
        let noise = |i: usize| ((i as u64 + (count << 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u8 & 0x37;
        let part = |dtype, shape: &[usize]| Constant::tensor(bytes_of(dtype, shape, noise));
        match codes.filter(|_| name.contains("proj")) {
            Some(codes) => {
                let of_scales = codes.granularity.scale_shape(&shape).unwrap();
                let zeros = codes.zeros.then(|| part(codes.dtype, &of_scales));
                let scales = part(dtype, &of_scales);
                Constant::quantized(part(codes.dtype, &shape), scales, zeros, codes.granularity).unwrap()
            }
            None => part(dtype, &shape),
        }
    })
}

fn plan(graph: &Graph, profile: &Profile, mode: WeightMode, form: QuantizedForm) -> usize {
    let options = LowerOptions {
        weight_mode: mode,
        quantized: form,
        prefill_quantized: Some(form),
        kernels: false,
        ..LowerOptions::for_engines()
    };
    let network = lower(graph, profile, &options).unwrap();
    let plan = tensorrt::build(&library(), &network, &BuildOptions::default());
    plan.unwrap_or_else(|error| panic!("{mode:?} {form:?}: {error}"))
        .bytes()
        .len()
}

fn formats() -> Vec<Codes> {
    let mut all = Vec::new();
    for dtype in [
        DType::I8,
        DType::U8,
        DType::I4,
        DType::U4,
        DType::I2,
        DType::U2,
        DType::F8E4M3Fn,
        DType::Nf4,
    ] {
        for granularity in [
            Granularity::Channel { axis: 0 },
            Granularity::Block { axis: 1, size: 32 },
        ] {
            for zeros in [false, true] {
                if zeros && dtype.is_float_format() {
                    continue;
                }
                all.push(Codes {
                    dtype,
                    granularity,
                    zeros,
                });
            }
        }
    }
    all
}

#[test]
fn every_format_builds_bound() {
    for codes in formats() {
        let graph = decoder(Some(codes));
        let (one, many) = (Profile::decode(64), Profile::prefill(8, 64));
        plan(&graph, &one, WeightMode::Bind, QuantizedForm::Dequantize);
        plan(&graph, &many, WeightMode::Bind, QuantizedForm::DequantizeApart);
        plan(&graph, &one, WeightMode::Bind, QuantizedForm::Elementwise);
    }
}

#[test]
fn a_copy_for_prompts_is_of_floats_and_computes_what_codes_do() {
    for codes in formats() {
        let graph = decoder(Some(codes));
        let spec = |prefill_copy| Spec {
            prefill_copy: Some(prefill_copy),
            ..Spec::default()
        };
        let network = |prefill_copy, profile: &Profile| {
            let conversion = spec(prefill_copy).resolve().unwrap();
            lower(&graph, profile, &conversion.lowering_of(profile)).unwrap()
        };
        let prompt = Profile::prefill(8, 64);
        let copy = network(true, &prompt);
        let names: Vec<&str> = copy.weights.iter().map(|weight| weight.name.as_str()).collect();
        assert!(
            !names.iter().any(|name| name.ends_with(".codes")),
            "{codes:?}: {names:?}"
        );
        assert!(
            copy.weights
                .iter()
                .filter(|w| w.constant.as_quantized().is_some())
                .all(|w| w.constant.dtype() == DType::F16)
        );
        // Decode engines are the same with it and without.
        let decode = Profile::decode(64);
        let layers = |prefill_copy| format!("{:?}", network(prefill_copy, &decode).layers);
        assert_eq!(layers(true), layers(false), "{codes:?}");
        let plan = tensorrt::build(&library(), &copy, &BuildOptions::default());
        plan.unwrap_or_else(|error| panic!("{codes:?}: {error}"));
    }
}

#[test]
fn embedded_codes_take_their_bits() {
    // Matrices of the layers; everything else is the same in all plans.
    let count = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 1024;
    let profile = Profile::decode(64);
    let embedded = |codes| plan(&decoder(codes), &profile, WeightMode::Embed, QuantizedForm::Elementwise);
    let floats = embedded(None);
    for codes in formats() {
        let saved = floats as f64 - embedded(Some(codes)) as f64;
        let bits = match codes.dtype {
            DType::I4 | DType::U4 => 4.0,
            // Their values.
            _ => 16.0,
        };
        // Scales, and zero points as floats, of blocks of 32.
        let more = match codes.granularity {
            Granularity::Block { .. } => 16.0 / 32.0 * 2.0,
            _ => 0.1,
        };
        let expected = (16.0 - bits - more) / 8.0 * count as f64;
        // In a small model kernels take part of the plan and differ; widened codes would save nothing.
        let least = if bits < 16.0 { expected * 0.5 } else { expected - 300e3 };
        assert!(
            saved > least,
            "{codes:?} saves {saved} bytes of {floats}, not {expected}"
        );
    }
}
