//! Arguments from Python: arrays and lists of integers, sizes, times, names. Every refusal names argument and remedy.

use numpy::prelude::*;
use numpy::{Element, PyArray1, PyArray2, PyReadonlyArray1, PyReadwriteArray1, PyReadwriteArray2, PyUntypedArray};
use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyInt, PyString};
use runtime_core::ids::mix;

use crate::errors::{ArrayTypeError, ArrayValueError, BadTimeError, OutOfRangeError};

/// Refuses an array of the wrong kind.
pub(crate) fn type_error(array: &str, problem: String, remedy: String) -> PyErr {
    ArrayTypeError::new_err((array.to_owned(), problem, remedy))
}

/// Refuses an array with unusable content.
pub(crate) fn value_error(array: &str, problem: String, remedy: String) -> PyErr {
    ArrayValueError::new_err((array.to_owned(), problem, remedy))
}

/// Element types of the boundary.
pub(crate) trait Item: Element + Copy {
    /// As numpy calls it.
    const NAME: &'static str;
}

macro_rules! items {
    ($($type:ty => $name:literal),*) => {$(impl Item for $type { const NAME: &'static str = $name; })*};
}
items!(u8 => "uint8", u16 => "uint16", u32 => "uint32", u64 => "uint64", f32 => "float32");

fn contiguous(name: &str, untyped: &Bound<'_, PyUntypedArray>, ndim: usize) -> PyResult<()> {
    if untyped.ndim() != ndim {
        let problem = format!("has {} dimensions, expected {ndim}", untyped.ndim());
        let remedy = if ndim == 1 { "pass array.ravel()" } else { "pass an array of shape (n, 4)" };
        return Err(value_error(name, problem, remedy.into()));
    }
    if !untyped.is_c_contiguous() {
        let remedy = format!("pass numpy.ascontiguousarray({name})");
        return Err(value_error(name, "is not contiguous".into(), remedy));
    }
    Ok(())
}

fn wrong_dtype<T: Item>(name: &str, untyped: &Bound<'_, PyUntypedArray>) -> PyErr {
    let found = untyped.dtype();
    let problem = format!("has dtype {found}, expected {}", T::NAME);
    type_error(name, problem, format!("pass {name}.astype(numpy.{})", T::NAME))
}

/// A contiguous native array of `T`, for reading.
pub(crate) fn array<'py, T: Item>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<PyReadonlyArray1<'py, T>> {
    if let Ok(array) = object.cast::<PyArray1<T>>() {
        if array.is_c_contiguous() && aligned(array.data()) {
            return array.try_readonly().map_err(|_| borrowed(name));
        }
    }
    let Ok(untyped) = object.cast::<PyUntypedArray>() else {
        return Err(no_array::<T>(name, object));
    };
    if !untyped.dtype().is_equiv_to(&numpy::dtype::<T>(object.py())) {
        return Err(wrong_dtype::<T>(name, untyped));
    }
    contiguous(name, untyped, 1)?;
    Err(misaligned(name))
}

fn aligned<T>(data: *const T) -> bool {
    data.addr() % align_of::<T>() == 0
}

fn misaligned(name: &str) -> PyErr {
    value_error(name, "is not aligned in memory".into(), format!("pass a copy: numpy.array({name})"))
}

fn unwritable(name: &str, error: &numpy::BorrowError) -> PyErr {
    let problem = match error {
        numpy::BorrowError::NotWriteable => "is read-only",
        _ => "is in use by another argument or call",
    };
    value_error(name, problem.into(), "pass an array of its own".into())
}

/// A contiguous array of shape (n, 4), for writing.
pub(crate) fn output_rows<'py>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<PyReadwriteArray2<'py, f32>> {
    let Ok(untyped) = object.cast::<PyUntypedArray>() else {
        return Err(no_array::<f32>(name, object));
    };
    if !untyped.dtype().is_equiv_to(&numpy::dtype::<f32>(object.py())) {
        return Err(wrong_dtype::<f32>(name, untyped));
    }
    contiguous(name, untyped, 2)?;
    if untyped.shape()[1] != 4 {
        let problem = format!("has {} columns, expected 4", untyped.shape()[1]);
        return Err(value_error(name, problem, "pass numpy.empty((n, 4), numpy.float32)".into()));
    }
    let Ok(array) = object.cast::<PyArray2<f32>>() else { return Err(wrong_dtype::<f32>(name, untyped)) };
    if !aligned(array.data()) {
        return Err(misaligned(name));
    }
    array.try_readwrite().map_err(|error| unwritable(name, &error))
}

/// A contiguous native array of `T` with at least `len` items, for writing.
pub(crate) fn output<'py, T: Item>(
    name: &str,
    object: &Bound<'py, PyAny>,
    len: usize,
) -> PyResult<PyReadwriteArray1<'py, T>> {
    let Ok(untyped) = object.cast::<PyUntypedArray>() else {
        return Err(no_array::<T>(name, object));
    };
    if !untyped.dtype().is_equiv_to(&numpy::dtype::<T>(object.py())) {
        return Err(wrong_dtype::<T>(name, untyped));
    }
    contiguous(name, untyped, 1)?;
    if untyped.len() < len {
        let problem = format!("has {} items, {len} are needed", untyped.len());
        return Err(value_error(name, problem, format!("pass numpy.empty({len}, numpy.{})", T::NAME)));
    }
    let Ok(array) = object.cast::<PyArray1<T>>() else { return Err(wrong_dtype::<T>(name, untyped)) };
    if !aligned(array.data()) {
        return Err(misaligned(name));
    }
    array.try_readwrite().map_err(|error| unwritable(name, &error))
}

fn borrowed(name: &str) -> PyErr {
    value_error(name, "is being written by another argument or call".into(), "pass an array of its own".into())
}

fn no_array<T: Item>(name: &str, object: &Bound<'_, PyAny>) -> PyErr {
    let problem = format!("is a {}, expected a numpy array of {}", kind_of(object), T::NAME);
    type_error(name, problem, format!("pass numpy.array({name}, numpy.{})", T::NAME))
}

/// The type's name.
pub(crate) fn kind_of(object: &Bound<'_, PyAny>) -> String {
    object.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string())
}

/// A list of integers that fit `T`; an array is refused with the name of the door that takes it.
pub(crate) fn list<'py, T>(name: &str, object: &Bound<'py, PyAny>, array_door: &str) -> PyResult<Vec<T>>
where
    T: Item + for<'a> FromPyObject<'a, 'py>,
{
    if object.cast::<PyUntypedArray>().is_ok() {
        let problem = "is a numpy array, expected a list".into();
        return Err(type_error(name, problem, format!("pass arrays to {array_door}")));
    }
    items(name, object)
}

fn items<'py, T>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Vec<T>>
where
    T: Item + for<'a> FromPyObject<'a, 'py>,
{
    if object.cast::<PyString>().is_ok() || object.cast::<PyBytes>().is_ok() {
        let problem = format!("is a {}, expected a list of integers", kind_of(object));
        return Err(type_error(name, problem, format!("pass a list of integers that fit {}", T::NAME)));
    }
    let iterator = object.try_iter().map_err(|_| {
        let problem = format!("is a {}, expected a list of integers", kind_of(object));
        type_error(name, problem, format!("pass a list of integers that fit {}", T::NAME))
    })?;
    let mut out = Vec::with_capacity(object.len().unwrap_or(0).min(1 << 20));
    for (i, item) in iterator.enumerate() {
        let item = item?;
        out.push(item.extract::<T>().map_err(|_| {
            let problem = format!("item {i} is {}, which does not fit {}", short(&item), T::NAME);
            type_error(name, problem, format!("pass integers that fit {}", T::NAME))
        })?);
    }
    Ok(out)
}

fn short(item: &Bound<'_, PyAny>) -> String {
    let text = item.repr().map_or_else(|_| kind_of(item), |text| text.to_string());
    text.chars().take(40).collect()
}

/// Block keys: an array, or any sequence of integers.
pub(crate) enum Keys<'py> {
    Array(PyReadonlyArray1<'py, u64>),
    List(Vec<u64>),
}

impl<'py> Keys<'py> {
    pub(crate) fn new(name: &str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        if object.cast::<PyUntypedArray>().is_ok() {
            array(name, object).map(Self::Array)
        } else {
            items(name, object).map(Self::List)
        }
    }

    pub(crate) fn as_slice(&self) -> &[u64] {
        match self {
            // Contiguity was checked when the array came in.
            Self::Array(array) => array.as_slice().unwrap_or(&[]),
            Self::List(list) => list,
        }
    }
}

/// An integer within bounds.
pub(crate) fn integer(what: &str, min: u64, max: u64, object: &Bound<'_, PyAny>) -> PyResult<u64> {
    match object.extract::<u64>() {
        Ok(value) if (min..=max).contains(&value) => Ok(value),
        Ok(_) => Err(OutOfRangeError::new_err((what.to_owned(), min, max, object.clone().unbind()))),
        Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) || object.cast::<PyInt>().is_ok() => {
            Err(OutOfRangeError::new_err((what.to_owned(), min, max, object.clone().unbind())))
        }
        Err(_) => {
            let problem = format!("is a {}, expected an integer", kind_of(object));
            Err(type_error(what, problem, format!("pass an integer from {min} to {max}")))
        }
    }
}

/// Seconds as microseconds; NaN, infinities, negative times and those beyond 64 bits are refused.
pub(crate) fn microseconds(seconds: f64) -> PyResult<u64> {
    const LIMIT_S: f64 = 1.8e13;
    if seconds.is_nan() || !(0.0..=LIMIT_S).contains(&seconds) {
        return Err(BadTimeError::new_err((seconds,)));
    }
    Ok((seconds * 1e6) as u64)
}

/// A 64-bit key for bytes: equal bytes give equal keys, in every process and version.
pub(crate) fn key_of(bytes: &[u8]) -> u64 {
    let mut key = mix(bytes.len() as u64);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        key = mix(key ^ u64::from_le_bytes(word));
    }
    key
}

/// A session's name: an integer from 0 to 2^64 - 1 as it is, a string by its key.
pub(crate) fn session_key(object: &Bound<'_, PyAny>) -> PyResult<u64> {
    if let Ok(text) = object.cast::<PyString>() {
        return Ok(key_of(text.to_cow()?.as_bytes()));
    }
    integer("session", 0, u64::MAX, object)
}
