//! The job file's keys. Their doc comments are the manual that users read, one key at a time:
//! meaning, unit, default, reason.
//!
//! Relative paths are taken from the directory of the job file; those in a `--set` argument, from
//! the current directory, where the shell completed them.

use super::diagnostic::Sink;
use super::read::{At, Field, FromNode, ManualEntry, entries, join, one_of, read, section, words};
use super::spec::{
    DeviceKind, FimLevel, MergeBase, NotebookMode, Optimizer, Packing, Precision, Schedule, SegmentFormat,
};
use super::tree::{Node, Value};
use crate::adapter::Targets;
use crate::base_plan::QuantKind;
use crate::model::PRESETS;

section! {
    /// A job file as it was written.
    JobFile {
        /// Name of the job, unique on a control plane: letters, digits, `-`, `_` and `.`.
        /// Default: the file's name without its extension.
        name: String,
        /// Directory for everything the job makes. Default: `runs/<name>`.
        output: String,
        /// A dataset directory that `coordinator collect` wrote. This or `collect` must be given.
        dataset: String,
        /// Repositories to collect a dataset from. This or `dataset` must be given.
        collect: CollectFile,
        /// Where the tokenizer comes from. Default: `from_model` with `model.path`; with
        /// `model.init` one is trained with as many entries as the preset has.
        tokenizer: TokenizerFile,
        /// Where the weights come from. Must be given.
        model: ModelFile,
        /// How files become batches.
        data: DataFile,
        /// Train a LoRA adapter on frozen, quantised weights instead of all weights.
        /// Default: all weights are trained.
        adapter: AdapterFile,
        /// How batches become weights.
        train: TrainFile,
        /// How the trained weights leave.
        export: ExportFile,
        /// Where ranks run.
        workers: WorkersFile,
    }
}

section! {
    /// What `coordinator collect` does.
    CollectFile {
        /// Git repositories: a path, `https://...`, `ssh://...`, `git@host:org/repo`, `file://...`,
        /// or a mapping with `location` and `revision`. Must be given.
        sources: Vec<At<SourceFile>>,
        /// File extensions that are left out, compared with the text after the last dot, case aside.
        /// Replaces the default list; `--set collect.exclude_extensions+=svg` adds to it.
        /// Default: pictures, video, sound, documents, archives, fonts, weights.
        exclude_extensions: Vec<At<String>>,
        /// Names of directories, with all that is in them, and of files that are left out: whole
        /// names. Replaces the default list; `+=` adds to it. Default: `.git`, `__pycache__`.
        exclude_path_parts: Vec<At<String>>,
        /// Files of more bytes than this are left out: they are mostly generated.
        /// Default: 1048576.
        max_file_bytes: u64,
        /// `code_cells` keeps the code cells of notebooks, joined by a blank line; `skip` leaves
        /// notebooks out. Default: `code_cells`.
        notebooks: NotebookMode,
        /// `arrow` (Feather v2) or `parquet`. Default: `arrow`, which `datasets` maps into memory.
        format: SegmentFormat,
        /// Share of files held out for evaluation, 0 to 0.5; above 0, at least one file.
        /// Default: 0.005.
        validation_fraction: f64,
        /// Seed of the choice of held-out files. Default: 0.
        split_seed: u64,
        /// Repositories fetched at once, 1 to 64. Default: 8.
        parallel_fetches: u32,
    }
}

section! {
    /// One repository, with a revision.
    SourceKeys {
        /// Path or URL.
        location: String,
        /// Branch, tag or commit. Default: the repository's HEAD.
        revision: String,
    }
}

section! {
    /// Where the tokenizer comes from: exactly one of these.
    TokenizerFile {
        /// Trains a byte-level BPE tokenizer on the dataset.
        train: TokenizerTrainFile,
        /// A `tokenizer.json`, or a directory that holds one.
        path: String,
        /// `true`: the tokenizer beside the model's weights.
        from_model: bool,
    }
}

section! {
    /// How a tokenizer is trained.
    TokenizerTrainFile {
        /// Entries of the vocabulary, 19 special tokens included: 275 (every byte has one) to
        /// 1000000. Default: as many as the model's preset has.
        vocab_size: u32,
    }
}

section! {
    /// Where the weights come from: exactly one of these.
    ModelFile {
        /// A Hugging Face model directory (`config.json` and safetensors files).
        path: String,
        /// Random weights.
        init: ModelInitFile,
    }
}

section! {
    /// How random weights are made.
    ModelInitFile {
        /// Shape: `tiny`, `demo`, `starcoderbase-1b`, `starcoderbase-3b`, `starcoderbase-7b` or
        /// `starcoder`. Must be given.
        preset: Preset,
        /// Seed of the weights. Default: 0.
        seed: u64,
    }
}

section! {
    /// How files become batches.
    DataFile {
        /// Tokens of one sequence, 8 to 1048576 and at most the model's positions.
        /// Default: 2048, or the preset's positions where those are fewer.
        sequence_tokens: u32,
        /// Share of documents that are rearranged for fill-in-the-middle, 0 to 1. Default: 0.5, so
        /// that plain continuation is learned as well.
        fim_rate: f64,
        /// Of those, the share in suffix-prefix-middle order, 0 to 1. Default: 0.5.
        fim_spm_rate: f64,
        /// `window` rearranges inside each packed sequence, so that no infill is cut apart;
        /// `document` rearranges whole files before packing.
        /// Default: `window`; `document` with `packing: seed_compatible`.
        fim_level: FimLevel,
        /// `continuous` is one stream over all files, with a new order in each epoch and nothing
        /// dropped; `seed_compatible` repeats, token for token, the buffers that the original
        /// StarCoder fine-tuning scripts made, dropped tails included. Default: `continuous`.
        packing: Packing,
        /// Seed of order and rearrangement. Default: 0.
        seed: u64,
    }
}

section! {
    /// A LoRA adapter on frozen weights; `adapter: {}` takes all defaults.
    AdapterFile {
        /// Inner width of each pair of matrices, 1 to 65536. Default: 32.
        rank: u64,
        /// The product of a pair is multiplied by `alpha / rank`. Above 0. Default: twice the rank.
        alpha: f64,
        /// Dropout on the input of each pair, 0 to below 1. Default: 0.
        dropout: f64,
        /// rsLoRA: multiply by `alpha / sqrt(rank)` instead. Default: false.
        rslora: bool,
        /// DoRA: learn a magnitude per output row as well; slower. Default: false.
        dora: bool,
        /// Which linears get a pair: a list of ends of their names (`c_attn`, `mlp.c_proj`), the same as
        /// text with commas, `all-linear`, or a regular expression over whole names
        /// (`transformer.h.0.attn.c_attn`). What matches nothing is told; nothing at all is an error.
        /// Default: `all-linear`.
        target_modules: Targets,
        /// Modules that are trained whole beside the pairs, by the end of their name, such as `ln_f`.
        /// Default: none.
        modules_to_save: Vec<At<String>>,
        /// How the frozen linears are held: `nf4` (4 bits, for normally distributed weights), `fp4`,
        /// `int8` (a scale per row), or `none` (in `train.precision`). Default: `nf4`.
        quantize: QuantKind,
        /// Weights that share a scale in the 4-bit kinds: a power of two from 32 to 4096. Default: 64.
        quantize_block: u32,
        /// Quantise the scales of the 4-bit kinds as well: 0.13 bits a weight instead of 0.5.
        /// Default: true.
        double_quantize: bool,
    }
}

section! {
    /// How batches become weights.
    TrainFile {
        /// Number of ranks over which weights and optimizer are sharded, 1 to 1024: one per GPU,
        /// or one per two to four cores. Default: 1.
        ranks: u32,
        /// `auto` (GPU where the worker has one), `cpu`, or `cuda` (an error without a GPU).
        /// Default: `auto`.
        device: DeviceKind,
        /// Dtype of the forward and backward pass, `bf16` or `fp32`. Master weights, optimizer and
        /// reductions are fp32 either way. Default: `bf16`.
        precision: Precision,
        /// Optimizer updates. Default: 2000.
        steps: u64,
        /// Sequences of one rank's forward pass: more use more memory and keep a GPU busier.
        /// Default: 1.
        micro_batch_sequences: u32,
        /// Micro-batches whose gradients are summed in one step. A step learns from
        /// `ranks x micro_batch_sequences x accumulate_micro_batches` sequences. Default: 2.
        accumulate_micro_batches: u32,
        /// Peak learning rate, above 0 to 1. Default: 5e-5, for fine-tuning, and 2e-4 with an `adapter`;
        /// random weights want about 1e-3.
        learning_rate: f64,
        /// `adamw` (fp32 moments), `adamw_8bit` (moments of 8 bits: 2 bytes a trained weight instead of
        /// 8), or `adamw_paged` (fp32 moments that a GPU pages from main memory). Default: `adamw`.
        optimizer: Optimizer,
        /// `cosine`, `linear` (both down to 0 at the last step) or `constant`. Default: `cosine`.
        schedule: Schedule,
        /// Steps of linear warm-up from 0. Default: 30, or a tenth of `steps` where that is fewer.
        warmup_steps: u64,
        /// Decoupled weight decay, 0 to 1; biases and norms are exempt. Default: 0.01.
        weight_decay: f64,
        /// AdamW's beta1 and beta2, each from 0 to below 1. Default: [0.9, 0.999].
        betas: [f64; 2],
        /// AdamW's epsilon, above 0 to 1. Default: 1e-8.
        epsilon: f64,
        /// Gradients are scaled down to this global norm; 0 turns clipping off. Default: 1.
        max_grad_norm: f64,
        /// Replaces every dropout probability of the model's config, 0 to below 1.
        /// Default: the config's own.
        dropout: f64,
        /// Recompute each block in the backward pass: a third more compute, far less memory.
        /// Default: true.
        recompute: bool,
        /// Seed of dropout. Default: 42.
        seed: u64,
        /// Steps between lines of progress. Default: 25.
        log_every_steps: u64,
        /// Steps between evaluations on the held-out files; 0 never. Default: 100; 0 without
        /// held-out files.
        eval_every_steps: u64,
        /// Most held-out sequences of one evaluation. Default: 64.
        eval_sequences: u32,
        /// Steps between checkpoints; 0 only at the end. Default: 500.
        checkpoint_every_steps: u64,
        /// Checkpoints that are kept, 1 to 1000; the oldest goes first. Default: 2.
        keep_checkpoints: u32,
    }
}

section! {
    /// How the trained weights leave.
    ExportFile {
        /// Write what was trained after training: a Hugging Face model directory, `<output>/export`; of
        /// an `adapter`, its files as PEFT has them, `<output>/adapter`. Default: true.
        enabled: bool,
        /// Dtype of the exported model's weights, `bf16` or `fp32`. Default: `bf16`.
        dtype: Precision,
        /// Write a whole model from an `adapter` as well, `<output>/export`: `original` merges into the
        /// weights as they were, `dequantized` into what it was trained against. Default: `none`.
        merge: MergeBase,
    }
}

section! {
    /// Where ranks run.
    WorkersFile {
        /// A running control plane, `http://host:port` or `https://host:port`.
        /// Default: a coordinator and workers are started for this job, on this machine.
        coordinator: String,
        /// Slots of the local worker; not with `coordinator`. Default: one per GPU; on CPU,
        /// `train.ranks`.
        slots: u32,
        /// Threads of each CPU rank, 1 to 1024. Default: cores divided by ranks.
        threads_per_rank: u32,
    }
}

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
words! { Schedule, "cosine, linear or constant" {
    "cosine" => Cosine, "linear" => Linear, "constant" => Constant,
} }
words! { FimLevel, "window or document" { "window" => Window, "document" => Document, } }
words! { Packing, "continuous or seed_compatible" {
    "continuous" => Continuous, "seed_compatible" => SeedCompatible,
} }
words! { NotebookMode, "code_cells or skip" { "code_cells" => CodeCells, "skip" => Skip, } }
words! { SegmentFormat, "arrow or parquet" { "arrow" => Arrow, "parquet" => Parquet, } }

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

/// One repository, written as text or as [`SourceKeys`].
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Path or URL.
    pub location: At<String>,
    /// Branch, tag or commit.
    pub revision: Field<String>,
}

impl FromNode for SourceFile {
    const KIND: &'static str = "a path, a URL, or a mapping with location and revision";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        if !matches!(node.value, Value::Map(_)) {
            let value = String::from_node(node, path, sink)?;
            let location = At { value, place: node.place.clone() };
            return Some(SourceFile { location, revision: Field::Absent });
        }
        let keys = SourceKeys::from_node(node, path, sink)?;
        match keys.location {
            Field::Given(location) => Some(SourceFile { location, revision: keys.revision }),
            Field::Wrong => None,
            Field::Absent => {
                sink.report(&node.place, format!("{path}: lacks location"));
                None
            }
        }
    }

    fn describe(path: &str, manual: &mut Vec<ManualEntry>) {
        SourceKeys::describe(path, manual);
    }
}

/// Every key of the job file, in the order of the file.
pub fn manual() -> Vec<ManualEntry> {
    let mut manual = Vec::new();
    JobFile::describe("", &mut manual);
    manual
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_explains_every_key_and_states_its_default() {
        let manual = manual();
        assert!(manual.iter().any(|entry| entry.key == "collect.sources[].revision"));
        for ManualEntry { key, kind, text } in &manual {
            let one_of_several = key.starts_with("tokenizer.") || key.starts_with("model.");
            let settled = ["Default: ", "must be given", "Must be given"].iter().any(|s| text.contains(s));
            let is_section = *kind == "a section" || key.ends_with("[].location");
            assert!(settled || is_section || one_of_several, "{key}: {text}");
        }
    }
}
