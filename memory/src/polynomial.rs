//! Polynomials over GF(2) modulo that of CRC-64/NVME, reflected: bit `i` of a number is the coefficient of `x^(63 - i)`.

/// The polynomial, without its highest term.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;
/// `x^0`.
pub const ONE: u64 = 1 << 63;

/// `value * x`, reduced.
#[must_use]
pub const fn times_x(value: u64) -> u64 {
    (value >> 1) ^ (POLYNOMIAL & (value & 1).wrapping_neg())
}

/// `a * b`, reduced.
#[must_use]
pub const fn multiply(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    let mut bit = ONE;
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        b = times_x(b);
        bit >>= 1;
    }
    product
}

/// `x^(2^k)`, reduced: lengths of frames have few bits, so that their powers take few products.
const SQUARES: [u64; 64] = {
    let mut squares = [ONE >> 1; 64];
    let mut k = 1;
    while k < 64 {
        squares[k] = multiply(squares[k - 1], squares[k - 1]);
        k += 1;
    }
    squares
};

/// `x^exponent`, reduced.
#[must_use]
pub const fn power(exponent: u64) -> u64 {
    let mut result = ONE;
    let mut k = 0;
    while k < 64 {
        if (exponent >> k) & 1 == 1 {
            result = multiply(result, SQUARES[k]);
        }
        k += 1;
    }
    result
}
