//! The words that stand for values.

use super::super::diagnostic::{Sink, shown};
use super::super::read::{At, FromNode, one_of, words};
use super::super::spec::{
    ChatLoss, ContentKind, DeviceKind, DuplicateMode, EncodingMode, FimLevel, InvalidMode, MergeBase,
    NotebookMode, Offload, Optimizer, Packing, Precision, Recompute, RepositoryOrder, Schedule, SecretMode,
    SegmentFormat, Strategy,
};
use super::super::tree::{Node, Value};
use crate::adapter::Targets;
use crate::base_plan::QuantKind;
use crate::model::PRESETS;

words! { DeviceKind, "auto, cpu or cuda" { "auto" => Auto, "cpu" => Cpu, "cuda" => Cuda, } }
words! { Precision, "bf16 or fp32" { "bf16" => Bf16, "fp32" => Fp32, } }
words! { Optimizer, "adamw, adamw_8bit or adamw_paged" {
    "adamw" => AdamW, "adamw_8bit" => AdamW8bit, "adamw_paged" => AdamWPaged,
} }
words! { QuantKind, "nf4, fp4, int8 or none" {
    "nf4" => Nf4, "fp4" => Fp4, "int8" => Int8, "none" => None,
} }
words! { MergeBase, "none, original or dequantized" {
    "none" => None, "original" => Original, "dequantized" => Dequantized,
} }
words! { Schedule, "cosine, linear, constant or polynomial" {
    "cosine" => Cosine, "linear" => Linear, "constant" => Constant, "polynomial" => Polynomial,
} }
words! { Strategy, "full_shard, shard_grad_op, hybrid_shard or no_shard" {
    "full_shard" => FullShard, "shard_grad_op" => ShardGradOp, "hybrid_shard" => HybridShard,
    "no_shard" => NoShard,
} }
words! { Offload, "none, optimizer or all" { "none" => None, "optimizer" => Optimizer, "all" => All, } }
words! { FimLevel, "window or document" { "window" => Window, "document" => Document, } }
words! { Packing, "continuous or seed_compatible" {
    "continuous" => Continuous, "seed_compatible" => SeedCompatible,
} }
words! { ContentKind, "code or chat" { "code" => Code, "chat" => Chat, } }
words! { InvalidMode, "error or drop" { "error" => Error, "drop" => Drop, } }
words! { ChatLoss, "assistant or all" { "assistant" => Assistant, "all" => All, } }
words! { NotebookMode, "code_cells, structured or skip" {
    "code_cells" => CodeCells, "structured" => Structured, "skip" => Skip,
} }
words! { EncodingMode, "drop or convert" { "drop" => Drop, "convert" => Convert, } }
words! { RepositoryOrder, "stars, updated or name" {
    "stars" => Stars, "updated" => Updated, "name" => Name,
} }
words! { SplitWord, "file, repository or date" {
    "file" => File, "repository" => Repository, "date" => Date,
} }
words! { DuplicateMode, "drop_near, drop_exact or keep" {
    "drop_near" => DropNear, "drop_exact" => DropExact, "keep" => Keep,
} }
words! { SecretMode, "redact, drop, report or off" {
    "redact" => Redact, "drop" => Drop, "report" => Report, "off" => Off,
} }
words! { SegmentFormat, "arrow or parquet" { "arrow" => Arrow, "parquet" => Parquet, } }

/// What is held out as one; the day of `date` stands in a key of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitWord {
    /// A file.
    File,
    /// A repository.
    Repository,
    /// What changed since a day.
    Date,
}

/// A name out of [`PRESETS`].
#[derive(Debug, Clone, Copy)]
pub struct Preset(pub &'static str);

impl FromNode for Preset {
    const KIND: &'static str = "the name of a preset";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        one_of(&PRESETS, node, path, sink).map(Preset)
    }
}

impl FromNode for Targets {
    const KIND: &'static str = "a list of names, or text";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        match &node.value {
            Value::List(_) => {
                let names = Vec::<At<String>>::from_node(node, path, sink)?;
                Some(Targets::Suffixes(names.into_iter().map(|name| name.value).collect()))
            }
            Value::Text(text) => Some(Targets::from_text(text)),
            other => {
                sink.report(&node.place, format!("{path}: expected {}, got {}", Self::KIND, other.found()));
                None
            }
        }
    }
}

impl FromNode for Recompute {
    const KIND: &'static str = "all, none or every N";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        let written = match &node.value {
            Value::Text(text) => text.as_str(),
            Value::Bool(on) => {
                let word = if *on { "all" } else { "none" };
                let message = format!("{path}: expected {}, got {on}: write {word}", Self::KIND);
                sink.report(&node.place, message);
                return None;
            }
            other => {
                sink.report(&node.place, format!("{path}: expected {}, got {}", Self::KIND, other.found()));
                return None;
            }
        };
        let every = written.strip_prefix("every ").and_then(|n| n.trim().parse().ok());
        match (written, every) {
            ("all", _) => Some(Recompute::All),
            ("none", _) => Some(Recompute::None),
            (_, Some(n)) if (1..=1024).contains(&n) => Some(Recompute::Every(n)),
            _ => {
                let message =
                    format!("{path}: expected {} (N from 1 to 1024), got {}", Self::KIND, shown(written));
                sink.report(&node.place, message);
                None
            }
        }
    }
}
