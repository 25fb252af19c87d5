//! How turns are laid out, in the templates that this program knows by name. They are Jinja, as Hugging Face tokenizers
//! have it: what the assistant says, and how it ends, stands between `{% generation %}` and `{% endgeneration %}`.

/// A template that is known by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuiltIn {
    /// Its name.
    pub name: &'static str,
    /// Its Jinja.
    pub jinja: &'static str,
    /// Control tokens that it needs, beside the end of text.
    pub special_tokens: &'static [&'static str],
}

/// All of them.
pub const BUILT_IN: [BuiltIn; 4] = [
    BuiltIn { name: "prompter", jinja: include_str!("prompter.jinja"), special_tokens: &[] },
    BuiltIn { name: "octocoder", jinja: include_str!("octocoder.jinja"), special_tokens: &[] },
    BuiltIn {
        name: "starchat",
        jinja: include_str!("starchat.jinja"),
        special_tokens: &["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    },
    BuiltIn {
        name: "chatml",
        jinja: include_str!("chatml.jinja"),
        special_tokens: &["<|im_start|>", "<|im_end|>"],
    },
];
