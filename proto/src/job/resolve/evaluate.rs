//! `evaluate`: what is asked of the model that a job has made.

use super::Resolver;
use super::serve::BLOCK;
use crate::base_plan::{QuantKind, Quantization};
use crate::job::file::EvaluateFile;
use crate::job::read::{At, Field};
use crate::job::spec::{AdapterSpec, DataSpec, EvaluateSpec, ExportSpec, MergeBase, TrainSpec};

const MAX_ITEMS: u32 = 1_000_000;
const MIN_WINDOW: u32 = 8;
const MAX_WINDOW: u32 = 1 << 20;

impl Resolver<'_> {
    pub(super) fn evaluate(
        &mut self,
        field: &Field<EvaluateFile>,
        train: &TrainSpec,
        data: &DataSpec,
        export: &ExportSpec,
        adapter: Option<&AdapterSpec>,
    ) -> Option<EvaluateSpec> {
        let At { value: file, place } = field.given()?;
        let trains = train.steps > 0;
        if trains && !export.enabled {
            self.sink.report(
                place,
                "evaluate needs what is exported, but export.enabled is false: set it to true, or leave evaluate out",
            );
        }
        if let (true, Some(at)) = (trains, file.adapter.given()) {
            let message = "evaluate.adapter is for a job that trains nothing (train.steps: 0): what this one trains is \
                           evaluated anyway";
            self.sink.report(&at.place, message);
        }
        let beside = adapter.filter(|_| export.merge == MergeBase::None);
        if beside.is_some_and(|adapter| adapter.lora.dora || !adapter.lora.modules_to_save.is_empty()) {
            self.sink.report(
                place,
                "evaluate cannot add this adapter to its base: it trains more than pairs; set export.merge, and the merged \
                 model is evaluated",
            );
        }
        let plain = Quantization { kind: QuantKind::None, block: BLOCK, double: true };
        let base = beside.map_or(plain, |adapter| adapter.quantization);
        let path = |resolver: &mut Self, field: &Field<String>| field.given().map(|at| resolver.path(at));
        let (humaneval, infilling) = (path(self, &file.humaneval), path(self, &file.infilling));
        let (adapter, python) = (path(self, &file.adapter), path(self, &file.python));
        let general = file.general.given().map(|list| list.value.iter().map(|at| self.path(at)).collect());
        let files = self.within("evaluate.files", &file.files, 0..=MAX_ITEMS, 500);
        let holes = self.within("evaluate.holes", &file.holes, 0..=MAX_ITEMS, 100);
        let samples_per_task = self.within("evaluate.samples_per_task", &file.samples_per_task, 1..=1000, 20);
        let window = data.sequence_tokens.clamp(MIN_WINDOW, MAX_WINDOW);
        let window_tokens =
            self.within("evaluate.window_tokens", &file.window_tokens, MIN_WINDOW..=MAX_WINDOW, window);
        if (files, holes) == (0, 0) && humaneval.is_none() && infilling.is_none() {
            let message = "evaluate asks for nothing: raise files or holes, or give humaneval or infilling";
            self.sink.report(place, message);
        }
        Some(EvaluateSpec {
            base: file.base.or(trains),
            humaneval,
            infilling,
            samples_per_task,
            files,
            holes,
            window_tokens,
            general: general.unwrap_or_default(),
            adapter,
            quantization: Quantization { kind: file.quantize.or(base.kind), ..base },
            python,
            allow_unisolated: file.allow_unisolated.or(false),
        })
    }
}
