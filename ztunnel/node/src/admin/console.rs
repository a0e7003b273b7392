//! What operators and `istioctl` ask on the admin port: dumps, the log's levels, profiles, and to stop.
//!
//! Whoever reaches this port may do all of it: the caller listens on the loopback only.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http::HeaderValue;
use http::Method;
use http::StatusCode;
use http::header;
use hyper::Response;
use tokio::sync::Semaphore;
use ztunnel_mesh::source::status::Reloader;
use ztunnel_runtime::shutdown::Signal;

use crate::admin::body;
use crate::admin::body::Body;
use crate::admin::dump::Sources;
use crate::admin::profile;
use crate::admin::profile::heap;
use crate::admin::quit::Quit;
use crate::admin::quit::Unanswered;
use crate::admin::server::not_allowed;
use crate::admin::server::text;
use crate::telemetry::Telemetry;
use crate::telemetry::logging::InvalidChange;
use crate::telemetry::logging::Levels;

/// How many dumps are written at once; more wait for their turn. Each holds a version of the mesh.
const DUMPS_MAX: usize = 2;

/// How long a profile is taken unless said otherwise.
const PROFILE_DEFAULT: Duration = Duration::from_secs(10);

/// The longest profile.
pub(super) const PROFILE_MAX: Duration = Duration::from_secs(300);

/// Samples per second of processor time, unless said otherwise.
const FREQUENCY_DEFAULT: u32 = 100;

/// The most samples per second.
const FREQUENCY_MAX: u32 = 1000;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const BYTES: HeaderValue = HeaderValue::from_static("application/octet-stream");

const LOGGING_HELP: &str = "\
usage: POST /logging                                    (the current levels)
usage: POST /logging?level=<level>                      (the level of everything without one of its own)
usage: POST /logging?level=<mod>:<level>,<mod>:<level>  (the levels of modules, such as access:debug)
usage: POST /logging?reset                              (back to the levels of the start)

A level is one of error, warn, info, debug, trace, off.
";

/// Everything the admin port answers from.
#[derive(Clone)]
pub struct Console(Arc<Parts>);

struct Parts {
    sources: Sources,
    levels: Levels,
    telemetry: Telemetry,
    quit: Quit,
    reloader: Reloader,
    dumps: Arc<Semaphore>,
}

/// A request, as far as it matters here.
pub(super) struct Asked<'a> {
    pub(super) method: &'a Method,
    pub(super) path: &'a str,
    pub(super) query: &'a str,
    pub(super) headers: &'a HeaderMap,
}

impl Console {
    /// Shows `sources`, changes `levels` (and those of `telemetry`'s access log), stops by `quit`, has the mesh read
    /// again by `reloader`.
    pub fn new(
        sources: Sources,
        levels: Levels,
        telemetry: Telemetry,
        quit: Quit,
        reloader: Reloader,
    ) -> Self {
        let dumps = Arc::new(Semaphore::new(DUMPS_MAX));
        Self(Arc::new(Parts { sources, levels, telemetry, quit, reloader, dumps }))
    }

    /// Answers, and says so if it must be heard before the process ends.
    pub(super) async fn answer(
        &self,
        asked: Asked<'_>,
        mut signal: Signal,
    ) -> (Response<Body>, Option<Unanswered>) {
        let response = match asked.path {
            "/" => of_type(HTML, DASHBOARD),
            "/config_dump" => self.dump(asked.headers).await,
            "/logging" if *asked.method == Method::POST => self.logging(asked.query),
            "/quitquitquit" if *asked.method == Method::POST => {
                let unanswered = self.0.quit.ask();
                signal.closing().await;
                return (text(StatusCode::OK, "shutdown now\n"), Some(unanswered));
            }
            "/reload" if *asked.method == Method::POST => self.reload(asked.query).await,
            "/logging" | "/quitquitquit" | "/reload" => not_allowed("POST"),
            "/debug/pprof/profile" => processor_profile(asked.query).await,
            "/debug/pprof/heap" => heap_profile().await,
            "/debug/pprof/heap/profiling" => heap_profiling(asked.query),
            _ => text(StatusCode::NOT_FOUND, "not found\n"),
        };
        (response, None)
    }

    async fn dump(&self, asked: &HeaderMap) -> Response<Body> {
        let turn = Arc::clone(&self.0.dumps).acquire_owned().await.expect("the semaphore is never closed");
        let (sources, gzip) = (self.0.sources.clone(), body::takes_gzip(asked));
        let body = body::written(gzip, move |out| {
            let written = sources.write(out);
            drop(turn);
            written
        });
        let mut response = Response::new(body);
        response.headers_mut().insert(header::CONTENT_TYPE, JSON);
        if gzip {
            response.headers_mut().insert(header::CONTENT_ENCODING, body::GZIP);
        }
        response
    }

    /// Has the mesh file read now; with `force`, whatever it takes away is meant.
    async fn reload(&self, query: &str) -> Response<Body> {
        let force = match forced(query) {
            Ok(force) => force,
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        };
        match self.0.reloader.reload(force).await {
            Some(Ok(said)) => text(StatusCode::OK, format!("{said}\n")),
            Some(Err(said)) => text(StatusCode::CONFLICT, format!("{said}\n")),
            None => text(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping\n"),
        }
    }

    fn logging(&self, query: &str) -> Response<Body> {
        match self.change_levels(query) {
            Ok(filter) => text(StatusCode::OK, format!("current log level is {filter}\n")),
            Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n\n{LOGGING_HELP}")),
        }
    }

    fn change_levels(&self, query: &str) -> Result<String, BadQuery> {
        let (mut level, mut reset) = (None, false);
        for (key, value) in parameters(query) {
            match key.as_str() {
                "level" => level = Some(value),
                "reset" => reset = true,
                _ => return Err(BadQuery::Unknown(key)),
            }
        }
        if level.is_none() && !reset {
            return Ok(self.0.levels.current().to_string());
        }
        let filter = self.0.levels.change(reset, level.as_deref())?;
        self.0.telemetry.set_access_log(filter.access_log());
        tracing::info!(%filter, "the log's levels were changed");
        Ok(filter.to_string())
    }
}

async fn processor_profile(query: &str) -> Response<Body> {
    let (duration, frequency) = match profile_parameters(query) {
        Ok(known) => known,
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    match profile::processor(duration, frequency).await {
        Ok(profile) => file("attachment; filename=\"profile.pb\"", profile),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

async fn heap_profile() -> Response<Body> {
    match heap::profile().await {
        Ok(profile) => file("attachment; filename=\"heap.pb.gz\"", profile),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// Says what is so, after making it so if it was asked for.
fn heap_profiling(query: &str) -> Response<Body> {
    let wanted = match activation(query) {
        Ok(wanted) => wanted,
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    match wanted {
        Some(true) => heap::activate(),
        Some(false) => heap::deactivate(),
        None => {}
    }
    let active = heap::is_active();
    if wanted.is_some() {
        tracing::info!(active, "heap profiling was changed");
    }
    text(StatusCode::OK, format!("heap profiling active: {active}\n"))
}

fn forced(query: &str) -> Result<bool, BadQuery> {
    let mut force = false;
    for (key, value) in parameters(query) {
        match (key.as_str(), value.as_str()) {
            ("force", "" | "true") => force = true,
            ("force", "false") => force = false,
            ("force", _) => return Err(BadQuery::Flag { key, value }),
            _ => return Err(BadQuery::Unknown(key)),
        }
    }
    Ok(force)
}

fn activation(query: &str) -> Result<Option<bool>, BadQuery> {
    let mut wanted = None;
    for (key, value) in parameters(query) {
        match (key.as_str(), value.parse()) {
            ("activate", Ok(activate)) => wanted = Some(activate),
            ("activate", Err(_)) => return Err(BadQuery::Flag { key, value }),
            _ => return Err(BadQuery::Unknown(key)),
        }
    }
    Ok(wanted)
}

/// What is to be kept as a file of this name.
fn file(disposition: &'static str, body: Vec<u8>) -> Response<Body> {
    let mut response = of_type(BYTES, body);
    response.headers_mut().insert(header::CONTENT_DISPOSITION, HeaderValue::from_static(disposition));
    response
}

fn profile_parameters(query: &str) -> Result<(Duration, u32), BadQuery> {
    let (mut duration, mut frequency) = (PROFILE_DEFAULT, FREQUENCY_DEFAULT);
    for (key, value) in parameters(query) {
        let bounded = |max: u32| {
            let number = value.parse().ok().filter(|number| (1..=max).contains(number));
            number.ok_or_else(|| BadQuery::Number { key: key.clone(), value: value.clone(), max })
        };
        match key.as_str() {
            "seconds" => duration = Duration::from_secs(bounded(PROFILE_MAX.as_secs() as u32)?.into()),
            "frequency" => frequency = bounded(FREQUENCY_MAX)?,
            _ => return Err(BadQuery::Unknown(key)),
        }
    }
    Ok((duration, frequency))
}

/// Why a query cannot be answered.
#[derive(Debug, thiserror::Error)]
enum BadQuery {
    #[error("{0:?} is not known here")]
    Unknown(String),
    #[error("{key}={value}: use a number from 1 to {max}")]
    Number { key: String, value: String, max: u32 },
    #[error("{key}={value}: use true or false")]
    Flag { key: String, value: String },
    #[error(transparent)]
    Level(#[from] InvalidChange),
}

/// The parameters of a query, decoded. What is not percent-encoded text stays as it is: nothing here has such a name, and no
/// value is taken that is not one of a few.
fn parameters(query: &str) -> impl Iterator<Item = (String, String)> {
    form_urlencoded::parse(query.as_bytes()).into_owned()
}

fn of_type(kind: HeaderValue, body: impl Into<bytes::Bytes>) -> Response<Body> {
    let mut response = text(StatusCode::OK, body);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

const DASHBOARD: &str = include_str!("console.html");

#[cfg(test)]
mod tests;
