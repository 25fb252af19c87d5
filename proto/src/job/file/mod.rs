//! The job file's keys. Their doc comments are the manual that users read, one key at a time:
//! meaning, unit, default, reason.
//!
//! Relative paths are taken from the directory of the job file; those in a `--set` argument, from
//! the current directory, where the shell completed them.

mod sources;
mod train;
mod words;

use super::diagnostic::Sink;
use super::read::{At, Field, FromNode, ManualEntry, entries, join, read, section};
use super::spec::{
    ChatLoss, ContentKind, DuplicateMode, EncodingMode, FimLevel, InvalidMode, MergeBase, NotebookMode,
    Packing, Precision, SecretMode, SegmentFormat,
};
use super::tree::{Node, Value};
use crate::adapter::Targets;
use crate::base_plan::QuantKind;

pub use sources::{OrganizationFile, RepositoryKeys, SourceFile, TableFile};
pub use train::TrainFile;
pub use words::{Preset, SplitWord};

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
        /// Where the tokenizer comes from. Default: `from_model` with `model.path` and `model.hub`; with
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
        /// Ask the model what it has learnt and what it has forgotten. Default: nothing is asked.
        evaluate: EvaluateFile,
        /// Answer editors with what was exported, until the job is stopped. Default: the job ends with its
        /// export.
        serve: ServeFile,
        /// Where ranks run.
        workers: WorkersFile,
        /// Which of several waiting jobs of a control plane gets slots first: the one with the higher
        /// number, 0 to 100, then the older. Default: 50.
        priority: u32,
        /// Longest time from submission to the end, 1 to 100000000: then the job stops with a
        /// checkpoint and has failed. Default: no limit.
        deadline_seconds: u64,
        /// What happens when an attempt fails.
        restart: RestartFile,
    }
}

section! {
    /// What happens when an attempt fails. Wrong settings, a full disk, a lack of memory and a loss that
    /// is not finite end the job at once: another attempt would fail as well.
    RestartFile {
        /// New attempts after failures, 0 to 1000; a machine that is taken away is no failure.
        /// Default: 5.
        max_restarts: u32,
        /// Pause before the first new attempt, 0 to 86400; it doubles with each attempt that makes no
        /// progress. Default: 5.
        backoff_seconds: f64,
        /// Longest pause, 0 to 86400. Default: 300.
        max_backoff_seconds: f64,
        /// So many attempts in a row without a new checkpoint end the job, 1 to 1000. Default: 3.
        max_attempts_without_progress: u32,
        /// A worker on which so many attempts failed is left out as long as others have room for the
        /// job, 1 to 1000. Default: 2.
        max_failures_per_worker: u32,
        /// Time that ranks have to save a checkpoint when they are told to stop, 0 to 86400. systemd's
        /// TimeoutStopSec and Kubernetes' terminationGracePeriodSeconds must be longer. Default: 600.
        stop_grace_seconds: u64,
        /// A rank hangs when it shows no progress for so long, and for ten times as long as it ever took
        /// before; 0.1 to 86400. Default: 300.
        hang_after_seconds: f64,
        /// The same for what a rank does for the first time, such as reading the model; 0.1 to 604800.
        /// Default: 3600.
        first_hang_after_seconds: f64,
    }
}

section! {
    /// What `coordinator collect` does.
    CollectFile {
        /// `code`: a row is a file. `chat`: a row is a conversation, and all sources are `dataset`; conversations are lists of
        /// turns (`role` and `content`, or `from` and `value`), lists of texts that take turns, or texts as
        /// OpenAssistant-Guanaco and the original system's assistant data have them. Default: `code`.
        kind: ContentKind,
        /// Git repositories: a path, `https://...`, `ssh://...`, `git@host:org/repo`, `file://...`,
        /// or a mapping with `location` and `revision`; `github`, for those of an organisation; `dataset`,
        /// for the rows of a dataset that others made. Must be given.
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
        /// Files with a line of more characters than this are left out: they hold data, or minified code;
        /// 1 to 1073741824. Default: 1000.
        max_line_chars: u64,
        /// Files whose lines have more characters than this on average are left out, 1 to 1073741824.
        /// Default: 100.
        max_mean_line_chars: f64,
        /// Files with a smaller share of letters and digits than this are left out, 0 to 1.
        /// Default: 0.25.
        min_alphanumeric_fraction: f64,
        /// Keep files that say in their first lines that a program has written them, and those named
        /// `*.min.js` or `*.min.css`. Default: false.
        keep_generated: bool,
        /// Keep lists of locked versions, such as `Cargo.lock` and `package-lock.json`. Default: false.
        keep_lock_files: bool,
        /// Keep what `.gitattributes` marks as `linguist-vendored` or `linguist-documentation`; what it marks
        /// as generated follows `keep_generated`. Default: false.
        keep_vendored: bool,
        /// Text that is not UTF-8: `drop` leaves its file out, `convert` guesses the encoding. Default: `drop`.
        encodings: EncodingMode,
        /// Licences by SPDX identifiers, such as `Apache-2.0`: where given, repositories in whose top
        /// directory none of these is found are left out. Default: any, and none.
        allow_licenses: Vec<At<String>>,
        /// Repositories in whose top directory one of these licences is found are left out, and so are files
        /// that name one with `SPDX-License-Identifier`. Default: none.
        deny_licenses: Vec<At<String>>,
        /// Files of evaluation tasks (JSONL, also gzipped, such as HumanEval's): what holds a description or a
        /// solution out of them is left out, so that scores measure ability and not memory. Default: none.
        decontaminate: Vec<At<String>>,
        /// Keys and passwords: `redact` replaces them, `drop` leaves their files out, `report` counts them,
        /// `off` does not look. Default: `redact`.
        secrets: SecretMode,
        /// Keep e-mail addresses, which otherwise are replaced when keys are. Default: false.
        keep_email_addresses: bool,
        /// `drop_near` keeps the first of files that say nearly the same, across repositories; `drop_exact` of
        /// those with the same content; `keep` keeps all. Default: `drop_near`.
        duplicates: DuplicateMode,
        /// Files with this share of their 5-grams of words in common say nearly the same, 0.1 to 1.
        /// Default: 0.7.
        near_duplicate_similarity: f64,
        /// `code_cells` keeps the code cells of notebooks, joined by a blank line; `structured` keeps text,
        /// code and outputs, between the marks that StarCoder learned (`<jupyter_start>`, ...); `skip` leaves
        /// notebooks out. Default: `code_cells`.
        notebooks: NotebookMode,
        /// A conversation with turns out of order, an empty turn, an unknown role or no answer at its end: `error` names it
        /// and collects nothing, `drop` leaves it out and counts it. Default: `error`.
        invalid_conversations: InvalidMode,
        /// `arrow` (Feather v2) or `parquet`. Default: `arrow`, which `datasets` maps into memory.
        format: SegmentFormat,
        /// Share of files held out for evaluation, 0 to 0.5; above 0, at least one file.
        /// Default: 0.005.
        validation_fraction: f64,
        /// What is held out as one: `file` (files that are alike stay together), `repository`, or `date`:
        /// what was changed since `validation_since`. Default: `file`.
        split_by: SplitWord,
        /// Files whose last change is of this day (UTC, `YYYY-MM-DD`) or later are held out; must be given with
        /// `split_by: date`, which fetches whole histories, and not otherwise.
        validation_since: String,
        /// Seed of the choice of held-out files. Default: 0.
        split_seed: u64,
        /// Repositories fetched at once, 1 to 64. Default: 8.
        parallel_fetches: u32,
        /// A repository that sends nothing for so long is asked again, a few times, 1 to 86400.
        /// Default: 60.
        fetch_timeout_seconds: u64,
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

/// `model`: [`ModelKeys`], or the text of one of them.
#[derive(Debug, Clone, Default)]
pub struct ModelFile(pub ModelKeys);

impl FromNode for ModelFile {
    const KIND: &'static str =
        "OWNER/NAME on the Hugging Face hub, a path that begins with / or ., or a section";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        let Value::Text(text) = &node.value else {
            return ModelKeys::from_node(node, path, sink).map(ModelFile);
        };
        let given = Field::Given(At { value: text.clone(), place: node.place.clone() });
        Some(ModelFile(match text.starts_with(['/', '.', '~']) {
            true => ModelKeys { path: given, ..ModelKeys::default() },
            false => ModelKeys { hub: given, ..ModelKeys::default() },
        }))
    }

    fn describe(path: &str, manual: &mut Vec<ManualEntry>) {
        ModelKeys::describe(path, manual);
    }
}

section! {
    /// Where the weights come from: exactly one of these.
    ModelKeys {
        /// A Hugging Face model directory (`config.json`, and safetensors files or `pytorch_model*.bin`).
        path: String,
        /// A model of the Hugging Face hub, `OWNER/NAME`: it is fetched into the cache that all the hub's tools share
        /// (`HF_HOME`), with the token that they use, and stays at the commit where it was found. `--fresh` looks again.
        hub: String,
        /// Branch, tag or commit of the hub's repository. Default: `main`.
        revision: String,
        /// Random weights.
        init: ModelInitFile,
    }
}

section! {
    /// How random weights are made.
    ModelInitFile {
        /// Shape: `tiny`, `demo`, or that of a published model, such as `starcoderbase-1b`, `decicoder-1b`,
        /// `starcoder2-3b`, `qwen2.5-coder-7b`, `codellama-7b` or `deepseek-coder-1.3b`; a name that is not known brings
        /// the list. Must be given.
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
        /// Put `<reponame>`, `<filename>` and what they say before each file, as StarCoder learned them; then
        /// prompts are to have them as well. Not with `packing: seed_compatible`. Default: false.
        metadata_prefix: bool,
        /// Let documents that share a sequence not see each other: attention stays within a document, and positions
        /// begin anew with each. Not with `packing: seed_compatible`. Default: false, as StarCoder was trained.
        document_mask: bool,
        /// How conversations become tokens: whole in one sequence each, several in a sequence, of which none sees another
        /// unless `document_mask` is false. Must be given for a dataset of `kind: chat`, and only then.
        chat: ChatFile,
        /// Seed of order and rearrangement. Default: 0.
        seed: u64,
    }
}

section! {
    /// How conversations become tokens.
    ChatFile {
        /// How turns are laid out: `prompter` (the original system's marks, in plain text), `octocoder` (`Question:` and
        /// `Answer:`), `starchat` or `chatml` (with control tokens, which are added where the vocabulary lacks them),
        /// `from_model` (the chat template beside the model's tokenizer), or a path to a Jinja file, as Hugging Face
        /// tokenizers have it. Must be given.
        template: String,
        /// What is learnt: `assistant` (what the assistant says, and how it ends) or `all`. For `assistant`, a template of
        /// others must mark it with `{% generation %}`. Default: `assistant`.
        loss: ChatLoss,
        /// What the system says in conversations where it says nothing. Default: nothing.
        system: String,
        /// Control tokens that are added where the vocabulary lacks them, for templates of others. Default: those of
        /// `starchat` and `chatml`.
        special_tokens: Vec<At<String>>,
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
    /// What is asked of the model that was exported, by all ranks together; results go to
    /// `<output>/evaluations`, and `coordinator compare` shows them. With `train.steps: 0` the job does nothing
    /// else, and asks `model` as it is.
    EvaluateFile {
        /// Ask the model as it was before training as well. Default: true where something is trained.
        base: bool,
        /// Tasks of HumanEval, `HumanEval.jsonl.gz` of openai/human-eval: programs that the model writes are run in
        /// a sandbox on the workers. Default: not asked.
        humaneval: String,
        /// Tasks of a set of openai/human-eval-infilling. Default: not asked.
        infilling: String,
        /// Completions of each task of HumanEval, 1 to 1000. Default: 20.
        samples_per_task: u32,
        /// Held-out files whose loss is computed, at most, 0 to 1000000. Default: 500.
        files: u32,
        /// Holes of each kind in held-out files, at most, 0 to 1000000. Default: 100.
        holes: u32,
        /// Tokens of a window of a file, and of a prompt, 8 to 1048576: positions that training has not seen say
        /// nothing. Default: `data.sequence_tokens`.
        window_tokens: u32,
        /// Other datasets: their held-out files tell what is forgotten. Default: none.
        general: Vec<At<String>>,
        /// An adapter beside the model, where nothing is trained. Default: none.
        adapter: String,
        /// How the linears are held: `nf4`, `fp4`, `int8` or `none`. Default: an unmerged `adapter`'s
        /// `quantize`, else `none`.
        quantize: QuantKind,
        /// Python interpreter of the workers that programs run with. Default: `python3` on PATH, or `/usr/bin/python3`.
        python: String,
        /// Run programs even on workers that cannot keep them apart. Default: false.
        allow_unisolated: bool,
    }
}

section! {
    /// The completion server that a job ends with: `worker serve` on one of its workers, started again where it fails. Of
    /// an `adapter` that is not merged, base and adapter are served, and the adapter answers who names neither.
    ServeFile {
        /// Address on the worker, `IP:PORT`. Default: `127.0.0.1:8080`.
        listen: String,
        /// A file on the worker with tokens, one in a line, of which requests must bear one. Must be given where
        /// `listen` is open to other machines. Default: anybody may ask.
        token_file: String,
        /// How the linears are held: `nf4`, `fp4`, `int8` or `none`. Default: an unmerged `adapter`'s
        /// `quantize`, else `none`.
        quantize: QuantKind,
        /// Completions under way at once, 1 to 1024. Default: 16.
        max_batch: u32,
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
        /// What an hour of all workers together costs, in any currency, 0 to 1000000: `coordinator plan`
        /// says what the job will. Default: no price.
        price_per_hour: f64,
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
