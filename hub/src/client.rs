//! Requests that are tried again while that can help, and answers that are checked.

use std::io::Read;
use std::time::Duration;

use reqwest::blocking::{self, RequestBuilder};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::redirect::Policy;
use serde_json::Value;

use super::{Error, Token};

/// Tries of a request; `huggingface_hub` gives up after as many.
pub(super) const TRIES: u32 = 6;
/// Longest wait between two, unless the hub asks for more, and the most that it can ask for.
const MAX_BACK_OFF: Duration = Duration::from_secs(16);
const MAX_ASKED_WAIT: Duration = Duration::from_secs(300);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// For an answer, and for bytes that are sent before it, at this rate at least.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
const MIN_BYTES_PER_SECOND: u64 = 64 << 10;
/// Longest answer that is read, and the most of it that an error repeats.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
const MAX_MESSAGE_CHARS: usize = 300;

/// Whether the same request may succeed a little later.
pub(super) fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
}

/// How long to wait after so many tries.
pub(super) fn back_off(tries: u32) -> Duration {
    Duration::from_secs(1 << (tries.saturating_sub(1)).min(10)).min(MAX_BACK_OFF)
}

/// How long a request that sends so many bytes may take.
pub(super) fn timeout(sent_bytes: u64) -> Duration {
    ANSWER_TIMEOUT + Duration::from_secs(sent_bytes / MIN_BYTES_PER_SECOND)
}

/// What may be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// Whatever passes: doing it twice does no harm.
    Freely,
    /// Only what the hub refused to begin with.
    IfRefused,
}

/// A client of one hub.
pub(super) struct Client {
    http: blocking::Client,
    authorization: Option<HeaderValue>,
}

/// A whole answer.
pub(super) struct Answer {
    /// What was asked.
    what: String,
    pub(super) status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Client {
    pub(super) fn new(token: Option<&Token>) -> Result<Self, Error> {
        Self::with_redirects(token, Policy::default())
    }

    /// A client that follows redirects by `policy`.
    pub(super) fn with_redirects(token: Option<&Token>, policy: Policy) -> Result<Self, Error> {
        let http = blocking::Client::builder()
            .user_agent(concat!("tunefleet/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            // Each request has its own.
            .timeout(None)
            .redirect(policy)
            .build()
            .map_err(|error| Error::Setting(format!("no HTTP client: {}", causes(&error))))?;
        let header = |token: &Token| {
            let mut header = HeaderValue::from_str(&token.authorization())
                .map_err(|_| Error::Setting("the token does not fit into a header".to_owned()))?;
            header.set_sensitive(true);
            Ok::<_, Error>(header)
        };
        Ok(Client { http, authorization: token.map(header).transpose()? })
    }

    /// For answers that are read as they come.
    pub(super) fn http(&self) -> &blocking::Client {
        &self.http
    }

    /// The request with the token: for the hub itself, and for no other server.
    pub(super) fn signed(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.authorization {
            Some(authorization) => request.header(AUTHORIZATION, authorization.clone()),
            None => request,
        }
    }

    /// Sends what `build` makes, anew for each try, until the answer is one that will not pass. `what` says
    /// what is being done, and where, and holds no query: those of the store's addresses are secrets.
    pub(super) fn send(
        &self,
        what: &str,
        repeat: Repeat,
        build: impl Fn(&blocking::Client) -> Result<RequestBuilder, Error>,
    ) -> Result<Answer, Error> {
        let mut tries = 1;
        loop {
            let outcome = build(&self.http)?.send().and_then(|response| read(what, response));
            let (failure, asked_wait, refused) = match outcome {
                Ok(answer) if !is_passing(answer.status) => return Ok(answer),
                Ok(answer) => {
                    let (wait, refused) = (asked_wait(&answer.headers), answer.status == 429);
                    (answer.refused(), wait, refused)
                }
                Err(error) => {
                    let cause = causes(&error.without_url());
                    if cause.contains("certificate") {
                        return Err(Error::Untrusted { what: what.to_owned(), cause });
                    }
                    (Error::Connection { what: what.to_owned(), cause, tries }, None, false)
                }
            };
            if tries == TRIES || (repeat == Repeat::IfRefused && !refused) {
                return Err(failure);
            }
            let wait = asked_wait.unwrap_or_else(|| back_off(tries)).min(MAX_ASKED_WAIT);
            tracing::warn!("{failure}; trying again in {} s", wait.as_secs());
            std::thread::sleep(wait);
            tries += 1;
        }
    }
}

fn read(what: &str, response: blocking::Response) -> Result<Answer, reqwest::Error> {
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let mut body = Vec::new();
    // An answer that breaks off or is longer than any is judged by what there is of it.
    let _ = response.take(MAX_ANSWER_BYTES).read_to_end(&mut body);
    Ok(Answer { what: what.to_owned(), status, headers, body })
}

/// An error with what caused it: reqwest's own words leave that out.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = cause.source();
    }
    text
}

/// `Retry-After` in seconds, or `RateLimit` with nothing remaining.
fn asked_wait(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let seconds = |text: &str| text.trim().parse().ok().map(Duration::from_secs);
    text("retry-after").and_then(seconds).or_else(|| {
        let mut parts = text("ratelimit")?.split(';').map(str::trim);
        let mut value = |key: &str| parts.find_map(|part| part.strip_prefix(key));
        if value("r=") == Some("0") { seconds(value("t=")?) } else { None }
    })
}

impl Answer {
    /// The answer, if it is a yes.
    pub(super) fn accepted(self) -> Result<Self, Error> {
        if (200..300).contains(&self.status) { Ok(self) } else { Err(self.refused()) }
    }

    /// An answer that is a no, as an error.
    fn refused(self) -> Error {
        let hint = match self.status {
            401 => {
                "; there is no such repository, or it wants a token that may see it (to push: one with write \
                 access): make one in the hub's settings, and give it with --token-file or HF_TOKEN"
            }
            403 => {
                "; the token may not do that there: check the repository's owner, its terms, and what the token may do"
            }
            404 => "; the address, the repository or the branch is not there, or the token does not see it",
            _ => "",
        };
        Error::Refused {
            message: self.message().map(|text| format!(": {text}")).unwrap_or_default(),
            what: self.what,
            status: self.status,
            hint: hint.to_owned(),
        }
    }

    /// The server's words.
    fn message(&self) -> Option<String> {
        let header = || self.header("x-error-message").map(str::to_owned);
        let json: Option<Value> = serde_json::from_slice(&self.body).ok();
        let in_json = || {
            let json = json.as_ref()?;
            let one = [&json["error"], &json["message"], &json["errors"][0]["message"]];
            one.into_iter().find_map(Value::as_str).map(str::to_owned)
        };
        let text = || (json.is_none()).then(|| String::from_utf8_lossy(&self.body).into_owned());
        let message = header().or_else(in_json).or_else(text)?;
        let shown = |c: char| if c.is_control() { ' ' } else { c };
        let message: String = message.trim().chars().take(MAX_MESSAGE_CHARS).map(shown).collect();
        (!message.is_empty()).then_some(message)
    }

    /// A header's text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body as JSON.
    pub(super) fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, Error> {
        serde_json::from_slice(&self.body)
            .map_err(|error| self.broken(format!("the answer is not what it should be: {error}")))
    }

    /// An error about this answer.
    pub(super) fn broken(&self, rule: impl Into<String>) -> Error {
        Error::Answer { what: self.what.clone(), rule: rule.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(&'static str, &'static str)], body: &str) -> Answer {
        let headers =
            headers.iter().map(|&(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)));
        Answer { what: "doing it".to_owned(), status, headers: headers.collect(), body: body.into() }
    }

    #[test]
    fn the_hubs_own_words_are_passed_on_wherever_they_stand() {
        for (headers, body) in [
            (vec![("x-error-message", "no room")], "{}"),
            (vec![], r#"{"error":"no room"}"#),
            (vec![], r#"{"errors":[{"message":"no room"}]}"#),
            (vec![], "no room\n"),
        ] {
            let error = answer(413, &headers, body).accepted().err().unwrap().to_string();
            assert_eq!(error, "doing it: the hub answered 413: no room");
        }
        let long = answer(500, &[], &"x".repeat(10_000)).accepted().err().unwrap().to_string();
        assert!(long.len() < 400);
        let silent = answer(403, &[], "").accepted().err().unwrap().to_string();
        assert!(silent.starts_with("doing it: the hub answered 403; the token may not do that"), "{silent}");
    }

    #[test]
    fn the_hub_says_how_long_to_wait() {
        let wait = |headers: &[_]| asked_wait(&answer(429, headers, "").headers).map(|wait| wait.as_secs());
        assert_eq!(wait(&[("retry-after", "7")]), Some(7));
        assert_eq!(wait(&[("ratelimit", r#""api";r=0;t=55"#)]), Some(55));
        assert_eq!(wait(&[("ratelimit", r#""api";r=3;t=55"#)]), None);
        assert_eq!(wait(&[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]), None);
    }

    #[test]
    fn waits_double_up_to_a_limit() {
        let seconds: Vec<u64> = (1..8).map(|tries| back_off(tries).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 16, 16]);
    }
}
