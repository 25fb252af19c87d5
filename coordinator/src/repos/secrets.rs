//! Keys, passwords and addresses of people in text: found by a word that must be near, a pattern, and how random the
//! match looks; what everybody writes as an example is left alone.
//!
//! What is found is replaced within the same token or quotes, so that code stays what it was to its parser.

use std::collections::BTreeMap;
use std::ops::Range;

use aho_corasick::AhoCorasick;
use regex::Regex;
use tunefleet_proto::job::SecretMode;

use super::filter::DropReason;

/// Where a pattern has a group, that is what is replaced; else all of it.
struct Rule {
    name: &'static str,
    /// One of these must be in the text, case aside; so most texts never meet the pattern.
    words: &'static [&'static str],
    pattern: &'static str,
    /// Bits of entropy of a character that a match has at least.
    entropy: f64,
    replacement: &'static str,
}

const KEY: &str = "<KEY>";
const PASSWORD: &str = "<PASSWORD>";
const EMAIL: &str = "<EMAIL>";

const fn key(
    name: &'static str,
    words: &'static [&'static str],
    pattern: &'static str,
    entropy: f64,
) -> Rule {
    Rule { name, words, pattern, entropy, replacement: KEY }
}

/// The forms are those that the providers document.
const RULES: [Rule; 26] = [
    key("private_key", &["private key"], r"-----BEGIN [A-Z ]*PRIVATE KEY-----([\s\S]{16,}?)-----END", 0.0),
    key("aws_access_key", &["akia", "asia"], r"\b((?:AKIA|ASIA)[A-Z2-7]{16})\b", 2.8),
    key(
        "aws_secret_key",
        &["aws", "secret"],
        r#"(?i)(?:aws|secret)\w{0,30}["']?\s*[:=]{1,2}>?\s*["']?([A-Za-z0-9/+]{40})(?:[^A-Za-z0-9/+=]|$)"#,
        4.0,
    ),
    key("github", &["ghp_", "gho_", "ghu_", "ghs_", "ghr_"], r"\b(gh[pousr]_[A-Za-z0-9]{36,255})\b", 3.0),
    key("github_fine_grained", &["github_pat_"], r"\b(github_pat_[A-Za-z0-9_]{36,255})\b", 3.0),
    key("gitlab", &["glpat-"], r"\b(glpat-[A-Za-z0-9_-]{20,})", 3.0),
    key("hugging_face", &["hf_"], r"\b(hf_[A-Za-z0-9]{30,})\b", 3.0),
    key("slack", &["xox"], r"\b(xox[abeprs]-[A-Za-z0-9-]{10,250})", 2.5),
    key(
        "slack_webhook",
        &["hooks.slack.com"],
        r"hooks\.slack\.com/(?:services|workflows)/([A-Za-z0-9_/]{20,})",
        3.0,
    ),
    key(
        "discord_webhook",
        &["webhooks/"],
        r"discord(?:app)?\.com/api/webhooks/([0-9]{15,20}/[\w-]{50,})",
        3.0,
    ),
    key("stripe", &["k_live_", "k_test_"], r"\b([rs]k_(?:live|test)_[A-Za-z0-9]{16,})\b", 3.0),
    key("google_api", &["aiza"], r"\b(AIza[0-9A-Za-z_-]{35})", 3.0),
    key("google_oauth", &["gocspx-"], r"\b(GOCSPX-[A-Za-z0-9_-]{28})", 3.0),
    key("anthropic", &["sk-ant-"], r"\b(sk-ant-[A-Za-z0-9_-]{24,})", 3.0),
    key("openai", &["sk-"], r"\b(sk-(?:proj-|svcacct-)?[A-Za-z0-9_-]{32,})", 3.5),
    key("npm", &["npm_"], r"\b(npm_[A-Za-z0-9]{36})\b", 3.0),
    key("pypi", &["pypi-"], r"\b(pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,})", 3.0),
    key("sendgrid", &["sg."], r"\b(SG\.[\w-]{20,24}\.[\w-]{39,50})", 3.0),
    key("twilio", &["twilio"], r#"(?i)twilio\w{0,20}["']?\s*[:=]\s*["']((?:SK|AC)?[0-9a-f]{32})["']"#, 3.0),
    key("mailgun", &["key-"], r"\b(key-[0-9a-f]{32})\b", 3.0),
    key("digitalocean", &["dop_v1_", "doo_v1_", "dor_v1_"], r"\b(do[opr]_v1_[a-f0-9]{64})\b", 3.0),
    key("telegram", &[":aa"], r"\b([0-9]{8,10}:AA[A-Za-z0-9_-]{33})", 3.0),
    key("azure_storage", &["accountkey="], r"(?i)AccountKey=([A-Za-z0-9+/]{86}==)", 4.0),
    key("jwt", &["eyj"], r"\b(eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})", 3.0),
    Rule {
        name: "password_in_url",
        words: &["://"],
        pattern: r#"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@"'<>{}$]{1,64}:([^\s/:@"'<>{}$]{4,100})@[A-Za-z0-9]"#,
        entropy: 1.5,
        replacement: PASSWORD,
    },
    Rule {
        name: "assigned",
        words: &["key", "token", "secret", "passw", "pwd", "credential"],
        pattern: r#"(?i)(?:(?:api_?key|access_?key|secret|password|passwd|pwd|credential)\w{0,20}|token(?:_\w{1,20})?)["']?\]?\s*(?::=|[:=]{1,2}>?)\s*["']([^\s"'<>{}$]{8,200})["']"#,
        entropy: 3.3,
        replacement: PASSWORD,
    },
];

/// Addresses of people, which are not secret but theirs.
const PERSONAL: [Rule; 1] = [Rule {
    name: "email",
    words: &["@"],
    pattern: r"\b([A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24})\b",
    entropy: 0.0,
    replacement: EMAIL,
}];

/// What is written as an example, in lower case: a match with one of these in it stays.
const EXAMPLES: [&str; 20] = [
    "example",
    "sample",
    "dummy",
    "placeholder",
    "changeme",
    "change_me",
    "change-me",
    "your",
    "xxxx",
    "1234567",
    "abcdef",
    "foobar",
    "fake",
    "redacted",
    "undefined",
    "password",
    "todo",
    "...",
    "secret_name",
    "noreply",
];
/// Domains that are made for examples, and addresses of machines.
const EXAMPLE_DOMAINS: [&str; 6] =
    ["example.com", "example.org", "example.net", ".invalid", ".test", ".localhost"];
/// Endings that make an address the name of a file: `icon@2x.png`.
const NO_DOMAINS: [&str; 8] = [".png", ".jpg", ".svg", ".gif", ".js", ".css", ".html", ".md"];

/// Looks for secrets.
pub struct Secrets {
    mode: SecretMode,
    rules: Vec<Compiled>,
    /// Finds the words of all rules in one pass.
    words: AhoCorasick,
    /// Which rule a word is of.
    rule_of: Vec<usize>,
}

struct Compiled {
    rule: &'static Rule,
    pattern: Regex,
    is_personal: bool,
}

/// What was found in a text, by rule.
pub type Found = BTreeMap<&'static str, u64>;

impl Secrets {
    /// A searcher of this mode; with `personal`, for addresses of people as well.
    pub fn new(mode: SecretMode, personal: bool) -> Self {
        static ALL: [&[Rule]; 2] = [&RULES, &PERSONAL];
        let groups: &[&'static [Rule]] = match (mode, personal) {
            (SecretMode::Off, _) => &[],
            (_, false) => &ALL[..1],
            (_, true) => &ALL,
        };
        let rules =
            groups.iter().enumerate().flat_map(|(group, rules)| rules.iter().map(move |rule| (group, rule)));
        let compile = |(group, rule): (usize, &'static Rule)| {
            let pattern = Regex::new(rule.pattern).expect("a pattern of this file, which a test compiles");
            Compiled { rule, pattern, is_personal: group == 1 }
        };
        let rules: Vec<Compiled> = rules.map(compile).collect();
        let words = rules
            .iter()
            .enumerate()
            .flat_map(|(at, rule)| rule.rule.words.iter().map(move |word| (at, *word)));
        let (rule_of, words): (Vec<usize>, Vec<&str>) = words.unzip();
        let words = AhoCorasick::builder().ascii_case_insensitive(true).build(words);
        Secrets { mode, rules, words: words.expect("words of this file, which a test compiles"), rule_of }
    }

    /// The text with what was found in it replaced, or as it is where it is only reported.
    ///
    /// # Errors
    /// [`DropReason::Secret`] where a file with a secret is dropped.
    pub fn clean(&self, text: String, found: &mut Found) -> Result<String, DropReason> {
        let finds = self.find(&text);
        if finds.is_empty() {
            return Ok(text);
        }
        for find in &finds {
            *found.entry(find.rule.name).or_default() += 1;
        }
        let is_secret = finds.iter().any(|find| !find.is_personal);
        match self.mode {
            SecretMode::Drop if is_secret => Err(DropReason::Secret),
            SecretMode::Drop | SecretMode::Redact => Ok(replaced(&text, &finds)),
            SecretMode::Report | SecretMode::Off => Ok(text),
        }
    }

    /// What is in a text, in its order, without overlaps.
    fn find(&self, text: &str) -> Vec<Find> {
        if self.rules.is_empty() {
            return Vec::new();
        }
        let mut is_near = vec![false; self.rules.len()];
        for word in self.words.find_overlapping_iter(text) {
            let rule = self.rule_of.get(word.pattern().as_usize());
            if let Some(is_near) = rule.and_then(|rule| is_near.get_mut(*rule)) {
                *is_near = true;
            }
        }
        let mut finds: Vec<Find> = Vec::new();
        for (Compiled { rule, pattern, is_personal }, _) in
            self.rules.iter().zip(is_near).filter(|(_, near)| *near)
        {
            for captures in pattern.captures_iter(text) {
                let Some(hit) = captures.get(1).or_else(|| captures.get(0)) else { continue };
                if is_one(rule, hit.as_str(), *is_personal) {
                    finds.push(Find { range: hit.range(), rule, is_personal: *is_personal });
                }
            }
        }
        finds.sort_by_key(|find| (find.range.start, std::cmp::Reverse(find.range.end)));
        let mut end = 0;
        finds.retain(|find| {
            let is_first = find.range.start >= end;
            if is_first {
                end = find.range.end;
            }
            is_first
        });
        finds
    }
}

/// One secret.
struct Find {
    range: Range<usize>,
    rule: &'static Rule,
    is_personal: bool,
}

fn is_one(rule: &Rule, hit: &str, is_personal: bool) -> bool {
    let lower = hit.to_ascii_lowercase();
    if is_personal {
        let is_example = EXAMPLE_DOMAINS.iter().any(|domain| lower.ends_with(domain));
        let is_file = NO_DOMAINS.iter().any(|ending| lower.ends_with(ending));
        // `git@github.com:org/repo` is nobody's.
        return !is_example && !is_file && !lower.starts_with("git@") && !lower.starts_with("noreply@");
    }
    let is_example = EXAMPLES.iter().any(|example| lower.contains(example));
    // Names of keys, paths and phrases are assigned as well; what was made at random has digits.
    let has = |kind: fn(&u8) -> bool| hit.as_bytes().iter().any(kind);
    if rule.name == "assigned" && !(has(u8::is_ascii_digit) && has(u8::is_ascii_alphabetic)) {
        return false;
    }
    rule.name == "private_key" || !is_example && entropy(hit) >= rule.entropy
}

/// Bits of entropy of a character, by how often each byte is there.
fn entropy(text: &str) -> f64 {
    let mut counts = [0u32; 256];
    for byte in text.bytes() {
        if let Some(count) = counts.get_mut(usize::from(byte)) {
            *count += 1;
        }
    }
    let all = text.len() as f64;
    counts
        .iter()
        .filter(|count| **count > 0)
        .map(|count| f64::from(*count) / all)
        .map(|p| -p * p.log2())
        .sum()
}

fn replaced(text: &str, finds: &[Find]) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut from = 0;
    for find in finds {
        clean.push_str(text.get(from..find.range.start).unwrap_or_default());
        clean.push_str(find.rule.replacement);
        from = find.range.end;
    }
    clean.push_str(text.get(from..).unwrap_or_default());
    clean
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    const BASE62: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    const HEX: &str = "0123456789abcdef";

    /// Nothing here is anybody's: made at random, and put together only while the test runs.
    fn random(random: &mut StdRng, of: &str, length: usize) -> String {
        (0..length).map(|_| char::from(of.as_bytes()[random.random_range(0..of.len())])).collect()
    }

    /// Lines with a secret of each provider, and the secret.
    fn planted(rng: &mut StdRng) -> Vec<(String, String)> {
        let mut all = Vec::new();
        let mut plant = |line: &str, secret: String| all.push((line.replace("{}", &secret), secret));
        let base32 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
        plant("aws_key = \"{}\"", format!("AKIA{}", random(rng, base32, 16)));
        plant("AWS_SECRET_ACCESS_KEY={}", random(rng, &format!("{BASE62}/+"), 40));
        plant("git clone https://{}@github.com/org/repo", format!("ghp_{}", random(rng, BASE62, 36)));
        plant("token: {}", format!("github_pat_{}_{}", random(rng, BASE62, 22), random(rng, BASE62, 59)));
        plant("GITLAB={}", format!("glpat-{}", random(rng, BASE62, 20)));
        plant("login(\"{}\")", format!("hf_{}", random(rng, BASE62, 34)));
        plant("slack('{}')", format!("xoxb-{}-{}", random(rng, "0123456789", 12), random(rng, BASE62, 24)));
        plant(
            "url = 'https://hooks.slack.com/services/{}'",
            format!("T{}/B{}/{}", random(rng, BASE62, 8), random(rng, BASE62, 8), random(rng, BASE62, 24)),
        );
        plant("stripe.api_key = '{}'", format!("sk_live_{}", random(rng, BASE62, 24)));
        plant("maps?key={}", format!("AIza{}", random(rng, BASE62, 35)));
        plant("ANTHROPIC_API_KEY={}", format!("sk-ant-api03-{}", random(rng, BASE62, 90)));
        plant("openai.api_key = \"{}\"", format!("sk-proj-{}", random(rng, BASE62, 48)));
        plant("//registry.npmjs.org/:_authToken={}", format!("npm_{}", random(rng, BASE62, 36)));
        plant("password = {}", format!("pypi-AgEIcHlwaS5vcmc{}", random(rng, BASE62, 60)));
        plant("SENDGRID={}", format!("SG.{}.{}", random(rng, BASE62, 22), random(rng, BASE62, 43)));
        plant("twilio_token = \"{}\"", random(rng, HEX, 32));
        plant("mailgun({})", format!("key-{}", random(rng, HEX, 32)));
        plant("do_token={}", format!("dop_v1_{}", random(rng, HEX, 64)));
        plant("bot {}", format!("{}:AA{}", random(rng, "123456789", 9), random(rng, BASE62, 33)));
        plant("DefaultEndpointsProtocol=https;AccountKey={};", format!("{}==", random(rng, BASE62, 86)));
        plant(
            "Authorization: Bearer {}",
            format!(
                "eyJ{}.eyJ{}.{}",
                random(rng, BASE62, 20),
                random(rng, BASE62, 40),
                random(rng, BASE62, 43)
            ),
        );
        plant("postgres://app:{}@db.internal:5432/app", random(rng, BASE62, 12));
        plant("db.password = \"{}\";", random(rng, BASE62, 16));
        plant("{ \"client_secret\": \"{}\" }", random(rng, BASE62, 32));
        plant("config['secret_token'] = '{}'", random(rng, HEX, 40));
        plant("const apiKey = '{}'", random(rng, BASE62, 32));
        all
    }

    /// Compiled once: the patterns take longer than any test.
    fn redact() -> &'static Secrets {
        static REDACT: LazyLock<Secrets> = LazyLock::new(|| Secrets::new(SecretMode::Redact, true));
        &REDACT
    }

    #[test]
    fn of_planted_secrets_of_all_providers_nearly_all_are_found() {
        let secrets = redact();
        let (mut planted_ones, mut missed) = (0, Vec::new());
        for seed in 0..40 {
            for (line, secret) in planted(&mut StdRng::seed_from_u64(seed)) {
                planted_ones += 1;
                let text = format!("# settings\nfirst = 1\n{line}\nlast = 2\n");
                let clean = secrets.clean(text, &mut Found::new()).unwrap();
                if clean.contains(&secret) {
                    missed.push(line);
                } else {
                    assert!(
                        clean.starts_with("# settings\nfirst = 1\n") && clean.ends_with("\nlast = 2\n"),
                        "{clean}"
                    );
                }
            }
        }
        let found = 1.0 - missed.len() as f64 / f64::from(planted_ones);
        eprintln!("{found:.4} of {planted_ones} planted secrets are found; missed: {missed:#?}");
        assert!(found >= 0.97, "{found}: {missed:#?}");
    }

    #[test]
    fn a_private_key_is_replaced_between_its_lines() {
        let body = random(&mut StdRng::seed_from_u64(1), BASE62, 64);
        let mark = "PRIVATE KEY-----";
        let text = format!("-----BEGIN RSA {mark}\n{body}\n{body}\n-----END RSA {mark}\n");
        let mut found = Found::new();
        let clean = redact().clean(text, &mut found).unwrap();
        assert_eq!(clean, format!("-----BEGIN RSA {mark}<KEY>-----END RSA {mark}\n"));
        assert_eq!(found, Found::from([("private_key", 1)]));
    }

    #[test]
    fn examples_names_and_expressions_are_left_alone() {
        for text in [
            "password = \"changeme123\"\n",
            "api_key = os.environ[\"API_KEY\"]\n",
            "token = \"<your-token>\"\n",
            "secret: \"${VAULT_SECRET_1}\"\n",
            "url = \"postgres://user:password@localhost/db\"\n",
            "key = \"AKIAIOSFODNN7EXAMPLE\"\n",
            "tokenizer = \"gpt2-medium-v1\"\n",
            "access_token = \"refresh_token\"\n",
            "git clone git@github.com:org/repo.git\n",
            "img = \"icon@2x.png\"; mail(\"me@example.com\")\n",
        ] {
            assert_eq!(redact().clean(text.to_owned(), &mut Found::new()).unwrap(), text);
        }
    }

    #[test]
    fn each_mode_does_what_it_says() {
        let secret = format!("ghp_{}", random(&mut StdRng::seed_from_u64(3), BASE62, 36));
        let text = format!("t = \"{secret}\"  # ann.lee@company.io\n");
        let clean = |mode, personal| {
            let mut found = Found::new();
            let clean = Secrets::new(mode, personal).clean(text.clone(), &mut found);
            (clean, found.into_iter().collect::<Vec<_>>())
        };
        let both = vec![("email", 1), ("github", 1)];
        let redacted = "t = \"<KEY>\"  # <EMAIL>\n".to_owned();
        assert_eq!(clean(SecretMode::Redact, true), (Ok(redacted), both.clone()));
        assert_eq!(clean(SecretMode::Report, true), (Ok(text.clone()), both.clone()));
        assert_eq!(clean(SecretMode::Drop, true), (Err(DropReason::Secret), both));
        assert_eq!(clean(SecretMode::Off, true), (Ok(text.clone()), Vec::new()));
        let (without, found) = clean(SecretMode::Redact, false);
        assert!(without.unwrap().contains("ann.lee@") && found == [("github", 1)]);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_searched_and_what_is_left_is_text_without_it(text in "\\PC*(key|token)? ?[=:] ?[\"']\\PC*") {
            let mut found = Found::new();
            let clean = redact().clean(text, &mut found).unwrap();
            let again = redact().clean(clean.clone(), &mut Found::new()).unwrap();
            proptest::prop_assert_eq!(clean, again);
        }
    }
}
