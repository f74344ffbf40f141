//! Rules on tool calls for `agentrt.safety`: hands arguments over as plain values, delegates to `tool_rules`.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use tool_rules::policy::Effect;
use tool_rules::rules::Reason;
use tool_rules::views::MAX_DEPTH;
use tool_rules::{Policy, RuleSet, Severity, Value};

/// Line, column, severity, code, message.
type Finding = (usize, usize, &'static str, &'static str, String);

fn effect_name(effect: Effect) -> &'static str {
    match effect {
        Effect::Allow => "allow",
        Effect::Deny => "deny",
        Effect::Ask => "ask",
    }
}

fn reason_name(reason: Reason) -> &'static str {
    match reason {
        Reason::Rule => "rule",
        Reason::Default => "default",
        Reason::Privileged => "privileged",
        Reason::UnknownTool => "unknown-tool",
        Reason::LookAlike => "look-alike",
        Reason::Taint => "taint",
        Reason::TooComplex => "too-complex",
    }
}

fn text(value: &Bound<'_, PyString>) -> Option<Value> {
    // Lone surrogates have no UTF-8: such text cannot be looked into.
    value.to_cow().ok().map(|s| Value::Str(s.into_owned()))
}

fn to_value(value: &Bound<'_, PyAny>, depth: usize) -> Value {
    if let Ok(s) = value.cast::<PyString>() {
        return text(s).unwrap_or(Value::Opaque);
    }
    if value.is_none() {
        return Value::Null;
    }
    if let Ok(b) = value.cast::<PyBool>() {
        return Value::Bool(b.is_true());
    }
    if let Ok(n) = value.cast::<PyInt>() {
        return n.extract().map_or_else(|_| n.extract().map_or(Value::Opaque, Value::Float), Value::Int);
    }
    if let Ok(x) = value.cast::<PyFloat>() {
        return Value::Float(x.value());
    }
    // One level beyond what the rules accept, so that they see that it is too deep.
    if depth > MAX_DEPTH + 1 {
        return Value::Opaque;
    }
    if let Ok(map) = value.cast::<PyDict>() {
        return Value::Map(map.iter().map(|(k, v)| (key(&k), to_value(&v, depth + 1))).collect());
    }
    if let Ok(list) = value.cast::<PyList>() {
        return Value::List(list.iter().map(|v| to_value(&v, depth + 1)).collect());
    }
    if let Ok(tuple) = value.cast::<PyTuple>() {
        return Value::List(tuple.iter().map(|v| to_value(&v, depth + 1)).collect());
    }
    if let Ok(bytes) = value.cast::<PyBytes>() {
        return Value::Str(String::from_utf8_lossy(bytes.as_bytes()).into_owned());
    }
    if let Ok(path) = value.call_method0("__fspath__") {
        if let Ok(s) = path.cast::<PyString>() {
            return text(s).unwrap_or(Value::Opaque);
        }
    }
    Value::Opaque
}

fn key(value: &Bound<'_, PyAny>) -> String {
    value.str().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A policy ready to decide.
#[pyclass(frozen, module = "agentrt._core")]
pub(crate) struct ToolRules {
    rules: RuleSet,
}

#[pymethods]
impl ToolRules {
    #[new]
    #[pyo3(signature = (text, /))]
    fn new(text: &str) -> PyResult<Self> {
        let (policy, findings) = Policy::parse(text);
        let Some(policy) = policy else {
            let first = findings.iter().find(|f| f.severity == Severity::Error);
            let message = first.map_or_else(String::new, |f| format!("line {}: {}", f.line, f.message));
            return Err(PyValueError::new_err(message));
        };
        RuleSet::new(policy).map(|rules| Self { rules }).map_err(PyValueError::new_err)
    }

    /// `(effect, rule index or -1, reason)` of a call.
    #[pyo3(signature = (tool, agent, session, labels, arguments, /))]
    fn decide(
        &self,
        tool: &str,
        agent: &str,
        session: &str,
        labels: &Bound<'_, PyTuple>,
        arguments: &Bound<'_, PyDict>,
    ) -> PyResult<(&'static str, i64, &'static str)> {
        let labels: Vec<String> = labels.extract()?;
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        let arguments: Vec<(String, Value)> = arguments.iter().map(|(k, v)| (key(&k), to_value(&v, 0))).collect();
        let decision = self.rules.decide(tool, agent, session, &labels, &arguments);
        let rule = decision.rule.map_or(-1, |index| index as i64);
        Ok((effect_name(decision.effect), rule, reason_name(decision.reason)))
    }

    /// The declared name that `name` means, or None.
    #[pyo3(signature = (name, /))]
    fn canonical_tool(&self, name: &str) -> Option<String> {
        self.rules.tool(name).map(|index| self.rules.policy().tools[index].name.clone())
    }

    /// `(id, effect, reason, line)` of each rule.
    fn rules(&self) -> Vec<(String, &'static str, String, usize)> {
        let rules = &self.rules.policy().rules;
        rules.iter().map(|r| (r.id.clone(), effect_name(r.effect), r.reason.clone(), r.line)).collect()
    }

    /// `(name, privileged, accepts, adds)` of each declared tool.
    fn tools(&self) -> Vec<(String, bool, Vec<String>, Vec<String>)> {
        let tools = &self.rules.policy().tools;
        tools.iter().map(|t| (t.name.clone(), t.privileged, t.accepts.clone(), t.adds.clone())).collect()
    }

    /// `(tool, labels it removes)` of each sanitiser.
    fn sanitisers(&self) -> Vec<(String, Vec<String>)> {
        self.rules.policy().sanitisers.iter().map(|s| (s.tool.clone(), s.removes.clone())).collect()
    }

    /// Labels that are no taint.
    fn trusted(&self) -> Vec<String> {
        self.rules.policy().trusted.clone()
    }
}

/// `(line, column, severity, code, message)` of everything found in a policy text.
#[pyfunction]
#[pyo3(signature = (text, /))]
pub(crate) fn check_policy(text: &str) -> Vec<Finding> {
    let (policy, mut findings) = Policy::parse(text);
    if let Some(policy) = policy {
        findings.extend(tool_rules::shadow::warnings(&policy));
        if let Err(message) = RuleSet::new(policy) {
            let (line, column, severity) = (1, 1, Severity::Error);
            findings.push(tool_rules::Finding { line, column, severity, code: "size", message });
        }
    }
    findings.sort_by_key(|f| (f.line, f.column));
    let name = |severity| {
        if severity == Severity::Error {
            "error"
        } else {
            "warning"
        }
    };
    findings.into_iter().map(|f| (f.line, f.column, name(f.severity), f.code, f.message)).collect()
}
