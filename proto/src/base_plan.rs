//! How the frozen base of an adapter lies in memory and on disk: one buffer of bytes per unit of the
//! walk, the same bytes in both places. Rank `r` of `N` holds the `r`-th of `N` equal ranges, so a
//! gathered buffer *is* the unit, as views.
//!
//! Linears of the blocks may be quantised; everything else keeps the dtype of the computation. The
//! formats are those of bitsandbytes (Dettmers et al. 2023 for NF4 with double quantisation).

use serde::{Deserialize, Serialize};

use crate::model::{ModelConfig, Parameter};
use crate::shard_plan::EMBED_UNIT;

/// Every part begins at a multiple of this many bytes, and every rank's range too.
pub const ALIGN_BYTES: u64 = 128;
/// Version of the layout, part of a cache's identity.
pub const BASE_PLAN_VERSION: u32 = 1;
/// Scales that share one second-level scale under double quantisation.
pub const DOUBLE_BLOCK: u64 = 256;

/// How a base's linears are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantKind {
    /// As they are, in the dtype of the computation.
    None,
    /// 4-bit codes spaced for normally distributed weights.
    Nf4,
    /// 4-bit floats.
    Fp4,
    /// 8-bit integers with one scale per row.
    Int8,
}

/// Settings of a quantised base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantization {
    /// How linears are held.
    pub kind: QuantKind,
    /// Weights that share a scale, for the 4-bit kinds.
    pub block: u32,
    /// Quantise the scales as well, for the 4-bit kinds.
    pub double: bool,
}

/// Block sizes that bitsandbytes knows.
pub const BLOCKS: [u32; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Dtype of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartDtype {
    /// Unsigned bytes.
    U8,
    /// Signed bytes.
    I8,
    /// 16-bit brain float.
    Bf16,
    /// 32-bit float.
    F32,
}

/// Where a tensor, or one component of a quantised one, lies in its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// First byte in the unit's buffer.
    pub offset: u64,
    /// Number of elements.
    pub elements: u64,
    /// Their dtype.
    pub dtype: PartDtype,
}

/// How one parameter is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    /// As it is.
    Plain(Part),
    /// 4-bit codes, two in a byte.
    FourBit {
        /// The codes.
        codes: Part,
        /// fp32 scale of each block; with `nested`, of each [`DOUBLE_BLOCK`] blocks.
        absmax: Part,
        /// 8-bit codes of the blocks' scales, and the fp32 value that is added to them.
        nested: Option<(Part, Part)>,
    },
    /// 8-bit integers.
    Int8 {
        /// The codes.
        codes: Part,
        /// fp32 scale of each row.
        scales: Part,
    },
}

/// One parameter of the base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseTensor {
    /// Name inside the unit.
    pub name: String,
    /// Full name in Hugging Face files.
    pub hf_name: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// How and where it is held.
    pub encoding: Encoding,
}

/// What is gathered at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseUnit {
    /// `embed` or `block.N`.
    pub name: String,
    /// Bytes of the buffer, without the padding of a world.
    pub bytes: u64,
    /// Parameters, in the order of the model.
    pub tensors: Vec<BaseTensor>,
}

/// The layout of a whole base; the same for any number of ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BasePlan {
    /// [`BASE_PLAN_VERSION`].
    pub version: u32,
    /// How linears are held.
    pub quantization: Quantization,
    /// Dtype of everything else.
    pub plain: PartDtype,
    /// `embed`, then `block.0` and so on.
    pub units: Vec<BaseUnit>,
}

impl Quantization {
    /// The settings of a [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        let kinds = [QuantKind::Nf4, QuantKind::Fp4, QuantKind::Int8, QuantKind::None];
        let all = kinds.into_iter().flat_map(|kind| {
            BLOCKS
                .into_iter()
                .flat_map(move |block| [false, true].map(move |double| Quantization { kind, block, double }))
        });
        all.into_iter().find(|settings| settings.name() == name)
    }

    /// A name for directories and people, e.g. `nf4-64-double`.
    pub fn name(&self) -> String {
        match self.kind {
            QuantKind::None => "plain".to_owned(),
            QuantKind::Int8 => "int8".to_owned(),
            QuantKind::Nf4 | QuantKind::Fp4 => {
                let kind = if self.kind == QuantKind::Nf4 { "nf4" } else { "fp4" };
                format!("{kind}-{}{}", self.block, if self.double { "-double" } else { "" })
            }
        }
    }
}

impl PartDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            PartDtype::U8 | PartDtype::I8 => 1,
            PartDtype::Bf16 => 2,
            PartDtype::F32 => 4,
        }
    }
}

impl Part {
    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.elements * self.dtype.bytes()
    }
}

impl BasePlan {
    /// The layout of `config`'s weights.
    pub fn new(config: &ModelConfig, quantization: Quantization, plain: PartDtype) -> Self {
        let mut units = vec![BaseUnit::new(EMBED_UNIT.to_owned(), config.embed_parameters(), None, plain)];
        for block in 0..config.layers {
            let parameters = config.block_parameters(block);
            units.push(BaseUnit::new(format!("block.{block}"), parameters, Some(quantization), plain));
        }
        BasePlan { version: BASE_PLAN_VERSION, quantization, plain, units }
    }
}

impl BaseUnit {
    fn new(
        name: String,
        parameters: Vec<Parameter>,
        quantization: Option<Quantization>,
        plain: PartDtype,
    ) -> Self {
        let mut end = 0;
        let mut part = |elements: u64, dtype: PartDtype| {
            let part = Part { offset: end, elements, dtype };
            end = (end + part.bytes()).next_multiple_of(ALIGN_BYTES);
            part
        };
        let mut tensors = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            let elements = parameter.elements();
            let quantization = quantization.filter(|_| parameter.shape.len() == 2);
            let encoding = match quantization {
                Some(Quantization { kind: QuantKind::Nf4 | QuantKind::Fp4, block, double }) => {
                    let blocks = elements.div_ceil(u64::from(block).max(1));
                    let codes = part(elements.div_ceil(2), PartDtype::U8);
                    if double {
                        let absmax = part(blocks.div_ceil(DOUBLE_BLOCK), PartDtype::F32);
                        let nested = (part(blocks, PartDtype::U8), part(1, PartDtype::F32));
                        Encoding::FourBit { codes, absmax, nested: Some(nested) }
                    } else {
                        Encoding::FourBit { codes, absmax: part(blocks, PartDtype::F32), nested: None }
                    }
                }
                Some(Quantization { kind: QuantKind::Int8, .. }) => Encoding::Int8 {
                    codes: part(elements, PartDtype::I8),
                    scales: part(parameter.shape[0], PartDtype::F32),
                },
                Some(Quantization { kind: QuantKind::None, .. }) | None => {
                    Encoding::Plain(part(elements, plain))
                }
            };
            let Parameter { name, hf_name, shape, .. } = parameter;
            tensors.push(BaseTensor { name, hf_name, shape, encoding });
        }
        BaseUnit { name, bytes: end, tensors }
    }

    /// Bytes of the buffer when `world` ranks hold equal ranges of it.
    pub fn padded_bytes(&self, world: u32) -> u64 {
        self.bytes.next_multiple_of(u64::from(world.max(1)) * ALIGN_BYTES)
    }

    /// Elements of a scratch for all quantised parameters, each at a multiple of 64.
    pub fn quantized_elements(&self) -> u64 {
        self.tensors.iter().filter(|t| t.is_quantized()).map(|t| t.elements().next_multiple_of(64)).sum()
    }
}

impl BaseTensor {
    /// One matrix in a buffer of its own.
    pub fn alone(shape: Vec<u64>, quantization: Quantization) -> Self {
        let parameter = Parameter { name: String::new(), hf_name: String::new(), shape, decays: true };
        let mut unit = BaseUnit::new(String::new(), vec![parameter], Some(quantization), PartDtype::F32);
        unit.tensors.remove(0)
    }

    /// Past the last byte of its parts.
    pub fn end(&self) -> u64 {
        let end = |part: &Part| part.offset + part.bytes();
        match &self.encoding {
            Encoding::Plain(part) => end(part),
            Encoding::Int8 { codes, scales } => end(codes).max(end(scales)),
            Encoding::FourBit { codes, absmax, nested } => {
                let nested = nested.as_ref().map_or(0, |(codes, offset)| end(codes).max(end(offset)));
                end(codes).max(end(absmax)).max(nested)
            }
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Whether it must be dequantised before use.
    pub fn is_quantized(&self) -> bool {
        !matches!(self.encoding, Encoding::Plain(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NF4: Quantization = Quantization { kind: QuantKind::Nf4, block: 64, double: true };

    /// By hand: 15,162,408,960 weights at 4 bits, 1 byte per 64 of them, 4 bytes per 64 x 256; the rest
    /// of the 15,517,456,384 parameters at 16 bits.
    #[test]
    fn starcoder_in_nf4_takes_what_was_worked_out_by_hand() {
        let config = ModelConfig::preset("starcoder").unwrap();
        let plan = BasePlan::new(&config, NF4, PartDtype::Bf16);
        let tensors = plan.units.iter().flat_map(|unit| &unit.tensors);
        let elements: u64 = tensors.filter(|t| t.is_quantized()).map(BaseTensor::elements).sum();
        assert_eq!(elements, 15_162_408_960);
        let bytes: u64 = plan.units.iter().map(|unit| unit.bytes).sum();
        let quantized = 15_162_408_960.0 * (0.5 + 1.0 / 64.0 + 4.0 / (64.0 * 256.0));
        let plain = (15_517_456_384.0 - 15_162_408_960.0) * 2.0;
        assert!((bytes as f64 / (quantized + plain) - 1.0).abs() < 1e-4);
    }

    #[test]
    fn settings_come_back_from_their_name() {
        for name in ["nf4-64-double", "nf4-4096", "fp4-32", "int8", "plain"] {
            assert_eq!(Quantization::from_name(name).unwrap().name(), name);
        }
        assert_eq!(Quantization::from_name("nf4-65"), None);
    }

    #[test]
    fn parts_are_aligned_and_do_not_overlap_whatever_the_settings() {
        let config = ModelConfig { hidden_size: 36, heads: 4, ..ModelConfig::preset("tiny").unwrap() };
        for kind in [QuantKind::None, QuantKind::Nf4, QuantKind::Fp4, QuantKind::Int8] {
            for double in [false, true] {
                let plan = BasePlan::new(&config, Quantization { kind, block: 128, double }, PartDtype::Bf16);
                for unit in &plan.units {
                    let mut end = 0;
                    for tensor in &unit.tensors {
                        let parts = match &tensor.encoding {
                            Encoding::Plain(part) => vec![*part],
                            Encoding::Int8 { codes, scales } => vec![*codes, *scales],
                            Encoding::FourBit { codes, absmax, nested } => {
                                let nested = nested.iter().flat_map(|(a, b)| [*a, *b]);
                                [*codes, *absmax].into_iter().chain(nested).collect()
                            }
                        };
                        for part in parts {
                            assert!(part.offset >= end && part.offset % ALIGN_BYTES == 0);
                            end = part.offset + part.bytes();
                        }
                    }
                    assert!(end <= unit.bytes && unit.padded_bytes(3) % (3 * ALIGN_BYTES) == 0);
                }
            }
        }
    }
}
