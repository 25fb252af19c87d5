//! `model` and `tokenizer`: where weights and vocabulary come from.

use super::Resolver;
use crate::job::diagnostic::Place;
use crate::job::file::{ModelFile, TokenizerFile};
use crate::job::read::{At, Field};
use crate::job::spec::{ModelSpec, TokenizerSpec, vocab_misfit};
use crate::model::ModelConfig;

/// Every byte and each of the 19 special tokens has an entry.
const MIN_VOCAB_SIZE: u32 = 275;
/// More is a slip: the largest models use about a quarter of a million.
const MAX_VOCAB_SIZE: u32 = 1_000_000;

impl Resolver<'_> {
    pub(super) fn model(&mut self, field: &Field<ModelFile>) -> Option<ModelSpec> {
        const NEEDED: &str =
            "model.path (a Hugging Face model directory) or model.init.preset (random weights)";
        let At { value: model, place } = match field {
            Field::Given(model) => model,
            Field::Wrong => return None,
            Field::Absent => return self.report(&Place::START, format!("lacks the model: give {NEEDED}")),
        };
        match (&model.path, &model.init) {
            (Field::Given(path), Field::Given(init)) => self.report(
                &init.place,
                format!("model.init and model.path ({}) contradict each other: keep one", path.place),
            ),
            (Field::Given(path), _) => Some(ModelSpec::Existing(self.path(path))),
            (_, Field::Given(At { value: init, place })) => match &init.preset {
                Field::Given(preset) => {
                    Some(ModelSpec::Init { preset: preset.value.0.to_owned(), seed: init.seed.or(0) })
                }
                Field::Absent => self.report(place, "model.init lacks preset"),
                Field::Wrong => None,
            },
            (Field::Absent, Field::Absent) => self.report(place, format!("lacks the model: give {NEEDED}")),
            _ => None,
        }
    }

    pub(super) fn tokenizer(
        &mut self,
        field: &Field<TokenizerFile>,
        model: Option<&ModelSpec>,
        shape: Option<&ModelConfig>,
    ) -> Option<TokenizerSpec> {
        let preset_vocab = shape.and_then(|shape| u32::try_from(shape.vocab_size).ok());
        let file = match field {
            Field::Wrong => return None,
            Field::Absent => TokenizerFile::default(),
            Field::Given(at) => at.value.clone(),
        };
        let from_model = file.from_model.given().filter(|at| at.value);
        let ways = [
            file.train.given().map(|at| ("tokenizer.train", &at.place)),
            file.path.given().map(|at| ("tokenizer.path", &at.place)),
            from_model.map(|at| ("tokenizer.from_model", &at.place)),
        ];
        let mut given = ways.into_iter().flatten();
        if let (Some((first, first_place)), Some((second, place))) = (given.next(), given.next()) {
            return self.report(
                place,
                format!("{second} and {first} ({first_place}) contradict each other: keep one"),
            );
        }
        if let Some(path) = file.path.given() {
            return Some(TokenizerSpec::Existing(self.path(path)));
        }
        if let (Some(at), Some(ModelSpec::Init { .. })) = (from_model, model) {
            let rule = "contradicts model.init: random weights come with no tokenizer; give tokenizer.train";
            return self.report(&at.place, format!("tokenizer.from_model {rule}"));
        }
        if let (None, Some(ModelSpec::Existing(_)) | None) = (file.train.given(), model) {
            return Some(TokenizerSpec::FromModel);
        }
        let train = file.train.or(Default::default());
        let default = preset_vocab.unwrap_or(49_152);
        let range = MIN_VOCAB_SIZE..=MAX_VOCAB_SIZE;
        let vocab_size = self.within("tokenizer.train.vocab_size", &train.vocab_size, range, default);
        if let (Some(at), Some(misfit)) =
            (train.vocab_size.given(), shape.and_then(|shape| vocab_misfit(vocab_size, shape)))
        {
            return self.report(&at.place, misfit);
        }
        Some(TokenizerSpec::Train { vocab_size })
    }
}
