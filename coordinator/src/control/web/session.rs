//! Who is logged in. A browser keeps its token in a cookie that no script can read and that no other site sends; it is
//! good as long as the token is.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;
use tonic::Status;

use super::{Web, refusal};
use crate::control::guard::Caller;
use crate::control::listen::Peer;

const COOKIE: &str = "tunefleet_token";
/// A month.
const MAX_AGE_SECONDS: u32 = 30 * 24 * 3600;

/// The token of a browser.
pub fn token(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| *name == COOKIE).map(|(_, value)| value)
}

/// Whether a browser that shows nothing was asked for this machine by a name of this machine. A name of another site
/// that leads here would let that site read the answers.
pub fn host_is_local(headers: &HeaderMap, authority: Option<&str>) -> bool {
    let host = headers.get(header::HOST).and_then(|value| value.to_str().ok()).or(authority);
    let Some(host) = host else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Login {
    token: String,
}

/// Takes a token.
pub async fn login(
    State(web): State<Web>,
    Extension(peer): Extension<Peer>,
    body: Result<Json<Login>, JsonRejection>,
) -> Response {
    let token = match body {
        Ok(Json(Login { token })) => token.trim().to_owned(),
        Err(rejection) => {
            return (StatusCode::BAD_REQUEST, Json(json!({ "error": rejection.body_text() })))
                .into_response();
        }
    };
    match web.guard.viewer(&token) {
        Ok(name) => {
            let mut response = Json(json!({ "name": name })).into_response();
            let secure = if web.is_tls { "; Secure" } else { "" };
            let cookie = format!(
                "{COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict; Max-Age={MAX_AGE_SECONDS}{secure}"
            );
            match HeaderValue::from_str(&cookie) {
                Ok(cookie) => drop(response.headers_mut().insert(header::SET_COOKIE, cookie)),
                Err(_) => return refusal(&Status::unauthenticated("this is not a token")),
            }
            response
        }
        Err(status) => {
            web.guard.refused(peer.address, "login", status.message());
            refusal(&status)
        }
    }
}

/// Forgets it.
pub async fn logout() -> Response {
    let cookie = HeaderValue::from_static("tunefleet_token=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0");
    (StatusCode::NO_CONTENT, [(header::SET_COOKIE, cookie)]).into_response()
}

/// Who this is.
pub async fn session(State(web): State<Web>, Extension(who): Extension<Caller>) -> Response {
    Json(json!({ "name": who.name, "asks_for_tokens": web.guard.asks_for_tokens() })).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn a_token_is_found_among_other_cookies() {
        let of = |value: &str| token(&headers(header::COOKIE, value)).map(str::to_owned);
        assert_eq!(of("a=b; tunefleet_token=tf_1; c=d"), Some("tf_1".to_owned()));
        assert_eq!(of("xtunefleet_token=1"), None);
        assert_eq!(of(";;="), None);
        assert_eq!(token(&HeaderMap::new()), None);
    }

    #[test]
    fn only_names_of_this_machine_are_local() {
        let local = |host: &str| host_is_local(&headers(header::HOST, host), None);
        for host in ["127.0.0.1:7070", "localhost", "LOCALHOST:1", "[::1]:7070", "127.8.8.8"] {
            assert!(local(host), "{host}");
        }
        for host in ["evil.example:7070", "10.0.0.1", "127.0.0.1.evil.example", "", "localhost.evil.example"]
        {
            assert!(!local(host), "{host}");
        }
        assert!(!host_is_local(&HeaderMap::new(), None));
        assert!(host_is_local(&HeaderMap::new(), Some("localhost:1")));
    }
}
