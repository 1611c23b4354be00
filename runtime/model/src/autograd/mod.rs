//! What training needs of torch's autograd and `tch` does not bind; a few lines of C++ reach it.

use std::ffi::{CStr, c_char, c_void};
use tch::{Device, Kind, Tensor};

/// Null, or a C string that lives until the thread's next failure.
type Failure = *const c_char;
/// `at::Tensor`, as torch's own bindings hand it out.
type Raw = c_void;

unsafe extern "C" {
    fn vicuna_backward(roots: *const *const Raw, gradients: *const *const Raw, count: usize) -> Failure;
    fn vicuna_rms_norm(input: *const Raw, weight: *const Raw, eps: f64, output: *mut *mut Raw) -> Failure;
    fn vicuna_swiglu(gate: *const Raw, up: *const Raw, output: *mut *mut Raw) -> Failure;
    fn vicuna_linear(x: *const Raw, weight: *const Raw, output: *mut *mut Raw) -> Failure;
}

/// Carries gradients back from tensors, each of its tensor's shape and kind, to the leaves that these were made of.
///
/// # Panics
///
/// As tch's own functions do: where memory is at its end, or shapes are wrong.
pub(crate) fn backward<const N: usize>(from: [(&Tensor, &Tensor); N]) {
    let roots = from.map(|(root, _)| root.as_ptr().cast());
    let gradients = from.map(|(_, gradient)| gradient.as_ptr().cast());
    // SAFETY: both are N pointers to tensors that live; autograd keeps references of its own.
    check(unsafe { vicuna_backward(roots.as_ptr(), gradients.as_ptr(), N) });
}

/// RMSNorm (Zhang and Sennrich 2019) of `x [.., H]` with `weight [H]`.
///
/// # Panics
///
/// As tch's own functions do.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    if !is_ours(x) || !is_ours(weight) {
        return x.rms_norm(weight.size().as_slice(), Some(weight), eps);
    }
    made(|normed| {
        // SAFETY: both tensors live; `normed` is a place for a pointer.
        unsafe { vicuna_rms_norm(x.as_ptr().cast(), weight.as_ptr().cast(), eps, normed) }
    })
}

/// silu(gate) · up, element by element (Shazeer 2020).
///
/// # Panics
///
/// As tch's own functions do.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    if !is_ours(gate) || !is_ours(up) {
        return gate.silu() * up;
    }
    made(|gated| {
        // SAFETY: both tensors live; `gated` is a place for a pointer.
        unsafe { vicuna_swiglu(gate.as_ptr().cast(), up.as_ptr().cast(), gated) }
    })
}

/// x · wᵀ of `x [.., I]` and `weight [O, I]`.
///
/// # Panics
///
/// As tch's own functions do.
pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> Tensor {
    let whole = |tensor: &Tensor| tensor.kind() == Kind::Float && is_ours(tensor) && tensor.numel() > 0;
    if !whole(x) || !whole(weight) {
        return x.linear(weight, None::<&Tensor>);
    }
    made(|product| {
        // SAFETY: both tensors live; `product` is a place for a pointer.
        unsafe { vicuna_linear(x.as_ptr().cast(), weight.as_ptr().cast(), product) }
    })
}

/// On a GPU torch has fused kernels of its own.
fn is_ours(tensor: &Tensor) -> bool {
    matches!(tensor.kind(), Kind::Float | Kind::BFloat16) && tensor.device() == Device::Cpu
}

fn made(make: impl FnOnce(*mut *mut Raw) -> Failure) -> Tensor {
    let mut output = std::ptr::null_mut();
    check(make(&mut output));
    // SAFETY: a new tensor that nobody else frees.
    unsafe { Tensor::from_ptr(output.cast()) }
}

#[expect(clippy::panic, reason = "what can fail here is what makes tch panic")]
fn check(failure: Failure) {
    if !failure.is_null() {
        // SAFETY: not null, so a C string; it is copied at once.
        let message = unsafe { CStr::from_ptr(failure) }.to_string_lossy().into_owned();
        panic!("torch: {message}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)];

    type Binary<'a> = &'a dyn Fn(&Tensor, &Tensor) -> Tensor;

    /// The function's value and gradients.
    fn both_ways(function: Binary<'_>, inputs: [&Tensor; 2], upstream: &Tensor) -> [Tensor; 3] {
        let [left, right] = inputs.map(|tensor| tensor.detach().set_requires_grad(true));
        let y = tch::with_grad(|| function(&left, &right));
        backward([(&y, upstream)]);
        [y.detach(), left.grad(), right.grad()]
    }

    fn assert_near(ours: Binary<'_>, torchs: Binary<'_>, inputs: [&Tensor; 2], upstream: &Tensor, tolerance: f64) {
        let exact =
            both_ways(torchs, inputs.map(|x| x.to_kind(Kind::Double)).each_ref(), &upstream.to_kind(Kind::Double));
        for (ours, exact) in both_ways(ours, inputs, upstream).iter().zip(exact) {
            assert_eq!(ours.kind(), inputs[0].kind());
            let largest = exact.abs().max().double_value(&[]).max(1.0);
            let off = (ours.to_kind(Kind::Double) - exact).abs().max().double_value(&[]);
            assert!(off <= tolerance * largest, "{off} of {largest}");
        }
    }

    #[test]
    fn norm_and_gate_and_their_gradients_are_torchs() {
        tch::manual_seed(1);
        for (kind, tolerance) in PLACES {
            for (rows, width) in [(3, 576), (40, 70), (1, 5)] {
                let random = |shape: &[i64]| (Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 3.0).to_kind(kind);
                let [x, y, upstream] = [(); 3].map(|()| random(&[2, rows, width]));
                let weight = random(&[width]);
                assert_near(
                    &|x, weight| rms_norm(x, weight, 1e-5),
                    &|x, weight| x.rms_norm(weight.size().as_slice(), Some(weight), 1e-5),
                    [&x, &weight],
                    &upstream,
                    tolerance,
                );
                assert_near(&swiglu, &|gate, up| gate.silu() * up, [&x, &y], &upstream, tolerance);
            }
        }
    }

    #[test]
    fn products_and_their_gradients_are_torchs() {
        tch::manual_seed(2);
        let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
        for (rows, inputs, outputs) in [(1, 1, 1), (40, 576, 192), (3, 70, 33)] {
            let (x, weight) = (random(&[2, rows, inputs]), random(&[outputs, inputs]));
            let torchs = |x: &Tensor, weight: &Tensor| x.linear(weight, None::<&Tensor>);
            assert_near(&linear, &torchs, [&x, &weight], &random(&[2, rows, outputs]), 1e-5);
        }
        let (left, right) = (random(&[5, 40]), random(&[5, 7]));
        let off = linear(&left.tr(), &right.tr()) - left.tr().matmul(&right);
        assert!(off.abs().max().double_value(&[]) < 1e-5, "transposed ones");
    }

    #[test]
    fn a_gate_far_out_is_open_or_shut() {
        let gate = Tensor::from_slice(&[-1e30_f32, -100.0, -0.0, 100.0, 1e30]);
        let gated = Vec::<f32>::try_from(swiglu(&gate, &gate.ones_like())).unwrap();
        assert!(gated[0].abs() < 1e-6 && gated[1].abs() < 1e-6, "{gated:?}");
        assert_eq!(gated[2..], [0.0, 100.0, 1e30]);
        assert!(
            swiglu(&(gate * f64::NAN), &Tensor::ones([5], (Kind::Float, Device::Cpu))).isnan().all().int64_value(&[])
                == 1
        );
    }

    #[test]
    fn numbers_do_not_depend_on_threads() {
        let x = Tensor::arange(200 * 96, (Kind::Float, Device::Cpu)).sin().view([200, 96]);
        let weight = Tensor::arange(96, (Kind::Float, Device::Cpu)).cos();
        let before = tch::get_num_threads();
        let bits = [1, 3].map(|threads| {
            tch::set_num_threads(threads);
            let norm = both_ways(&|x, weight| rms_norm(x, weight, 1e-6), [&x, &weight], &x);
            let weight = x.narrow(0, 0, 120);
            let product = both_ways(&linear, [&x, &weight], &x.narrow(1, 0, 1).expand([200, 120], false));
            (norm, both_ways(&swiglu, [&x, &x], &x), product)
        });
        tch::set_num_threads(before);
        assert_eq!(bits[0], bits[1]);
    }
}
