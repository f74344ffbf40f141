//! Maps the errors of the Rust crates to the classes of `agentrt.errors`, field by field.

use pyo3::import_exception;
use pyo3::prelude::*;

import_exception!(agentrt.errors, AgentRTError);
import_exception!(agentrt.errors, ArrayTypeError);
import_exception!(agentrt.errors, ArrayValueError);
import_exception!(agentrt.errors, BadLineError);
import_exception!(agentrt.errors, BadOptionError);
import_exception!(agentrt.errors, BadTimeError);
import_exception!(agentrt.errors, BadTraceError);
import_exception!(agentrt.errors, BusyError);
import_exception!(agentrt.errors, FileAccessError);
import_exception!(agentrt.errors, NoMemoryError);
import_exception!(agentrt.errors, OutOfRangeError);
import_exception!(agentrt.errors, PolicyError);
import_exception!(agentrt.errors, UnknownPolicyError);
import_exception!(agentrt.errors, UnknownWorkloadError);

/// The Python exception of an error of the core.
pub(crate) fn from_core(error: runtime_core::Error) -> PyErr {
    use runtime_core::Error;
    match error {
        Error::OutOfRange { what, min, max, requested } => OutOfRangeError::new_err((what, min, max, requested)),
        Error::Busy { what } => BusyError::new_err((what,)),
        other => AgentRTError::new_err(other.to_string()),
    }
}

/// The Python exception of a replay error.
pub(crate) fn from_replay(error: ::replay::Error) -> PyErr {
    use ::replay::Error;
    match error {
        Error::Io { path, source } => FileAccessError::new_err((path.display().to_string(), reason(&source))),
        Error::BadLine { path, line, field, problem, remedy } => {
            BadLineError::new_err((path.display().to_string(), line, field, problem, remedy))
        }
        Error::BadTrace { path, problem, remedy } => {
            BadTraceError::new_err((path.display().to_string(), problem, remedy))
        }
        Error::UnknownPolicy { name, known } => UnknownPolicyError::new_err((name, known)),
        Error::UnknownWorkload { name, known } => UnknownWorkloadError::new_err((name, known)),
        Error::BadOption { option, problem, remedy } => BadOptionError::new_err((option, problem, remedy)),
        Error::BrokenPromise { policy, problem } => PolicyError::new_err((policy, problem)),
    }
}

/// The operating system's words without Rust's ` (os error 2)`.
fn reason(source: &std::io::Error) -> String {
    let text = source.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}
