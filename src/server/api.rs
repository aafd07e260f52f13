//! Requests and answers as JSON.

use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use mambabyte_datasets::text::lossy_text;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::ApiError;
use super::prompt::Prompts;
use super::{App, Limits, TEXTS};
use crate::generate::{Request, SamplingConfig};

/// The likeliest bytes that may be asked for at every place, as at OpenAI.
const TOP: usize = 5;

/// Stop strings of a request, and bytes of each.
const STOPS: (usize, usize) = (16, 256);

/// A body as JSON of a form.
pub(super) fn parse<'a, T: Deserialize<'a>>(
    body: &'a std::result::Result<Bytes, BytesRejection>,
) -> Result<T, ApiError> {
    match body {
        Ok(body) => serde_json::from_slice(body).map_err(|error| ApiError::bad(error.to_string())),
        Err(rejection) => Err(ApiError::new(rejection.status(), rejection.body_text())),
    }
}

/// `POST /v1/completions`. Keys that would change the answer and are not known here are refused.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CompletionRequest {
    model: String,
    prompt: Prompts,
    max_tokens: Option<usize>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    /// Not in OpenAI's API; as in vLLM's.
    top_k: Option<usize>,
    /// Not in OpenAI's API; as in vLLM's.
    min_p: Option<f64>,
    /// Not in OpenAI's API; as in vLLM's.
    repetition_penalty: Option<f64>,
    n: Option<usize>,
    pub stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<usize>,
    pub echo: Option<bool>,
    stop: Option<Stop>,
    seed: Option<u64>,
    best_of: Option<usize>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    logit_bias: Option<serde_json::Map<String, Value>>,
    suffix: Option<String>,
    #[serde(rename = "user")]
    _user: Option<String>,
}

/// How to stream.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// Stop strings: one or a list.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Stop {
    One(String),
    Many(Vec<String>),
}

/// A request that can be met.
#[derive(Clone, Debug)]
pub(super) struct Order {
    /// One for each text of the answer, in the order of the answer's indices.
    pub requests: Vec<Request>,
    /// Whether the answer has the prompts in it.
    pub echo: bool,
    /// With log-probabilities, and so many of the likeliest bytes.
    pub logprobs: Option<usize>,
    /// Pieces as they come.
    pub stream: bool,
    /// A last piece with the counts.
    pub include_usage: bool,
    /// When its time is over.
    pub deadline: Instant,
}

impl CompletionRequest {
    /// Checks the request against what this server can do.
    pub fn order(self, name: &str, limits: &Limits) -> Result<Order, ApiError> {
        if self.model != name {
            return Err(ApiError::new(
                StatusCode::NOT_FOUND,
                format!("there is no model `{}` here; there is `{name}`", self.model),
            ));
        }
        self.refuse_what_is_not_there()?;
        let n = within("n", self.n.unwrap_or(1), 1, TEXTS)?;
        let max_new_bytes = self.max_tokens.unwrap_or(16);
        let max_new_bytes = within("max_tokens", max_new_bytes, 0, limits.new_bytes)?;
        let logprobs = self.logprobs.map(|top| within("logprobs", top, 0, TOP));
        let logprobs = logprobs.transpose()?;
        let (echo, stream) = (self.echo.unwrap_or(false), self.stream.unwrap_or(false));
        if stream && (logprobs.is_some_and(|top| top > 1) || (echo && logprobs.is_some())) {
            return Err(ApiError::bad(
                "a streamed answer has log-probabilities of new bytes only, with `logprobs` up to 1",
            ));
        }
        let Prompts(prompts) = self.prompt;
        let texts = prompts.len().saturating_mul(n);
        within("the number of prompts times `n`", texts, 1, TEXTS)?;
        let bytes: usize = prompts.iter().map(Vec::len).sum();
        let bytes = bytes.saturating_mul(n);
        let most = limits.prompt_bytes;
        within(
            "the length of the prompts in bytes, times `n`,",
            bytes,
            0,
            most,
        )?;
        if logprobs.is_some() && !stream {
            // Each has an entry in the answer, as a prompt's bytes have.
            let what = "`max_tokens` times the number of texts, with `logprobs`,";
            within(what, max_new_bytes.saturating_mul(texts), 0, most)?;
        }
        let stop = stops(self.stop)?;
        let sampling = SamplingConfig {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
        };
        sampling.check().map_err(ApiError::bad)?;
        let seed = self.seed.unwrap_or_else(rand::random);
        let requests = prompts.into_iter().flat_map(|prompt| {
            Request {
                max_new_bytes,
                sampling: sampling.clone(),
                seed,
                stop: stop.clone(),
                ..Request::new(prompt)
            }
            .samples(n)
        });
        Ok(Order {
            // Equal prompts of a batch still draw numbers of their own.
            requests: requests
                .enumerate()
                .map(|(index, request)| Request {
                    stream: index as u64,
                    ..request
                })
                .collect(),
            echo,
            logprobs,
            stream,
            include_usage: self.stream_options.unwrap_or_default().include_usage == Some(true),
            deadline: Instant::now() + limits.deadline,
        })
    }

    /// What OpenAI's API has and this server has not is an error where it would matter.
    fn refuse_what_is_not_there(&self) -> Result<(), ApiError> {
        let zero = |it: Option<f64>| it.is_none_or(|it| it == 0.0);
        let missing = [
            (
                "best_of",
                self.best_of.is_none_or(|it| it == self.n.unwrap_or(1)),
            ),
            ("presence_penalty", zero(self.presence_penalty)),
            ("frequency_penalty", zero(self.frequency_penalty)),
            (
                "logit_bias",
                self.logit_bias.as_ref().is_none_or(|it| it.is_empty()),
            ),
            ("suffix", self.suffix.as_ref().is_none_or(String::is_empty)),
        ];
        match missing.into_iter().find(|(_, harmless)| !harmless) {
            Some((key, _)) => Err(ApiError::bad(format!("`{key}` is not supported here"))),
            None => Ok(()),
        }
    }
}

fn within(what: &str, value: usize, from: usize, to: usize) -> Result<usize, ApiError> {
    match (from..=to).contains(&value) {
        true => Ok(value),
        false => Err(ApiError::bad(format!(
            "{what} is {value}, expected {from} to {to}"
        ))),
    }
}

fn stops(stop: Option<Stop>) -> Result<Vec<Vec<u8>>, ApiError> {
    let stops = match stop {
        None => Vec::new(),
        Some(Stop::One(stop)) => vec![stop],
        Some(Stop::Many(stops)) => stops,
    };
    within("the number of stop strings", stops.len(), 0, STOPS.0)?;
    for stop in &stops {
        within(
            "the length of a stop string in bytes",
            stop.len(),
            1,
            STOPS.1,
        )?;
    }
    Ok(stops.into_iter().map(String::into_bytes).collect())
}

/// `GET /health`.
pub(super) async fn health(State(app): State<App>) -> Json<Value> {
    Json(json!({
        "status": "ok", "model": app.options.name, "room": app.worker.room(),
    }))
}

/// `GET /v1/models`.
pub(super) async fn models(State(app): State<App>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [describe(&app)] }))
}

/// `GET /v1/models/NAME`.
pub(super) async fn model(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match name == app.options.name {
        true => Ok(Json(describe(&app))),
        false => Err(ApiError::new(
            StatusCode::NOT_FOUND,
            format!("there is no model `{name}` here"),
        )),
    }
}

fn describe(app: &App) -> Value {
    json!({
        "id": app.options.name, "object": "model", "created": app.started, "owned_by": "mambabyte",
        "max_model_len": app.options.limits.prompt_bytes,
    })
}

/// `GET /tokenizer_info`. Byte 0, which text does not have, stands for an end.
pub(super) async fn tokenizer_info() -> Json<Value> {
    Json(json!({
        "tokenizer_class": "bytes", "vocab_size": 256, "add_bos_token": false,
        "eos_token": "\0", "bos_token": null, "pad_token": null, "unk_token": null,
    }))
}

/// `POST /tokenize`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenizeRequest {
    prompt: String,
    #[serde(rename = "model")]
    _model: Option<String>,
    /// There are none.
    #[serde(rename = "add_special_tokens")]
    _add_special_tokens: Option<bool>,
}

/// The answer. It becomes JSON as it is: a [`Value`] takes 32 times the memory of its byte.
#[derive(Serialize)]
pub(super) struct Tokenized {
    tokens: Vec<u8>,
    count: usize,
    max_model_len: usize,
}

/// The bytes of a text.
pub(super) async fn tokenize(
    State(app): State<App>,
    body: std::result::Result<Bytes, BytesRejection>,
) -> Result<Json<Tokenized>, ApiError> {
    let TokenizeRequest { prompt, .. } = parse(&body)?;
    let most = app.options.limits.prompt_bytes;
    Ok(Json(Tokenized {
        count: within("the length of the prompt in bytes", prompt.len(), 0, most)?,
        tokens: prompt.into_bytes(),
        max_model_len: most,
    }))
}

/// `POST /detokenize`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DetokenizeRequest {
    tokens: Vec<u8>,
    #[serde(rename = "model")]
    _model: Option<String>,
}

/// The text of bytes; what is no UTF-8 shows as U+FFFD.
pub(super) async fn detokenize(
    State(app): State<App>,
    body: std::result::Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let DetokenizeRequest { tokens, .. } = parse(&body)?;
    let most = app.options.limits.prompt_bytes;
    within("the number of tokens", tokens.len(), 0, most)?;
    Ok(Json(json!({ "prompt": lossy_text(&tokens) })))
}

/// Any other path.
pub(super) async fn no_such_route() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "there is nothing at this path")
}

/// A path with another method than its own.
pub(super) async fn no_such_method() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "this path takes another method",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VALID: &str = r#"{"model": "m", "prompt": ["ab", "c"], "max_tokens": 5, "n": 2,
        "temperature": 0.5, "top_p": 0.9, "logprobs": 2, "echo": true, "stop": ["x", "yz"],
        "seed": 1, "stream": false, "logit_bias": {}, "user": "u"}"#;

    fn limits() -> Limits {
        Limits {
            prompt_bytes: 100,
            new_bytes: 50,
            ..Limits::default()
        }
    }

    /// What becomes of a body; an order that is accepted is within all bounds.
    fn order(body: &[u8]) -> Result<Order, ApiError> {
        let body = Ok(Bytes::copy_from_slice(body));
        let request: CompletionRequest = parse(&body)?;
        let order = request.order("m", &limits())?;
        let texts = order.requests.len();
        assert!((1..=TEXTS).contains(&texts));
        let prompts: usize = order.requests.iter().map(|it| it.prompt.len()).sum();
        assert!(prompts <= 100);
        for request in &order.requests {
            assert!(request.max_new_bytes <= 50);
            assert!(request.sampling.check().is_ok());
            assert!(
                request
                    .stop
                    .iter()
                    .all(|stop| (1..=STOPS.1).contains(&stop.len()))
            );
        }
        Ok(order)
    }

    #[test]
    fn every_text_draws_numbers_of_its_own() {
        let order = order(VALID.as_bytes()).expect("valid");
        let of = |order: &Order| -> Vec<(Vec<u8>, u64, u64)> {
            let one = |it: &Request| (it.prompt.clone(), it.seed, it.stream);
            order.requests.iter().map(one).collect()
        };
        let [a, b, c] = [b"ab".to_vec(), b"ab".to_vec(), b"c".to_vec()];
        let d = c.clone();
        assert_eq!(of(&order), [(a, 1, 0), (b, 1, 1), (c, 1, 2), (d, 1, 3)]);
        assert_eq!(
            (order.echo, order.logprobs, order.stream),
            (true, Some(2), false)
        );
    }

    /// What a request costs is bounded with `n` counted in.
    #[test]
    fn many_texts_of_a_long_prompt_are_refused() {
        let order = |prompt: usize, n: usize, new: usize, logprobs: Value, stream: bool| {
            let body = json!({
                "model": "m", "prompt": "x".repeat(prompt), "n": n, "max_tokens": new,
                "logprobs": logprobs, "stream": stream,
            });
            order(body.to_string().as_bytes()).map_err(|error| error.body().to_string())
        };
        assert!(order(50, 2, 0, json!(5), false).is_ok());
        let refused = order(51, 2, 0, json!(5), false).expect_err("102 bytes to score");
        assert!(refused.contains("times `n`, is 102"), "{refused}");
        assert!(order(1, 2, 50, json!(1), false).is_ok());
        let refused = order(1, 3, 50, json!(1), false).expect_err("150 bytes to score");
        assert!(refused.contains("is 150, expected 0 to 100"), "{refused}");
        assert!(order(1, 3, 50, json!(1), true).is_ok(), "sent as they come");
        assert!(order(1, 3, 50, json!(null), false).is_ok(), "no scores");
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = order(&body);
        }

        #[test]
        fn damaged_requests_are_answered(
            changes in prop::collection::vec((0usize..400, any::<u8>()), 1..4), cut in 0usize..400,
        ) {
            let mut body = VALID.as_bytes().to_vec();
            for (at, byte) in changes {
                let at = at % body.len();
                body[at] = byte;
            }
            let _ = order(&body);
            let _ = order(&body[..cut.min(body.len())]);
        }

        #[test]
        fn odd_values_are_answered(
            key in prop::sample::select(vec![
                "prompt", "max_tokens", "n", "temperature", "top_p", "top_k", "min_p",
                "repetition_penalty", "logprobs", "echo", "stop", "seed", "stream",
                "stream_options", "best_of", "logit_bias", "suffix", "odd",
            ]),
            value in prop_oneof![
                any::<f64>().prop_map(|it| json!(it)), any::<i64>().prop_map(|it| json!(it)),
                any::<bool>().prop_map(|it| json!(it)), "\\PC{0,12}".prop_map(|it| json!(it)),
                prop::collection::vec(any::<i16>(), 0..5).prop_map(|it| json!(it)),
                prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..5)
                    .prop_map(|it| json!(it)),
                Just(json!(null)), Just(json!({})), Just(json!([[[[]]]])),
            ],
        ) {
            let mut body: Value = serde_json::from_str(VALID).expect("JSON");
            body[key] = value;
            let _ = order(body.to_string().as_bytes());
        }
    }
}
