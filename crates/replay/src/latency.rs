//! The latency model: what a call costs on one device, given how much of its prompt was cached.
//!
//! prefill(u, c) = alpha + beta u + gamma u (c + u / 2), with u uncached and c cached tokens: the linear term is the
//! matrix work per token, the quadratic one attention over everything before. Decoding is batched and costs
//! `decode_s_per_token` per output token without occupying the device exclusively.
//!
//! The simulator takes steps instead: step(T, P, D, K) = base + max(weights, beta T) + gamma P + sigma D + kappa K for T
//! tokens of which P pairs are prefilled, D sequences that decode, and K tokens before theirs. A step reads all weights
//! once, whatever it computes. See [`LatencyModel::step_s`].

/// What one step of continuous batching computes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Batch {
    /// Tokens, prefilled and decoded.
    pub tokens: f64,
    /// Of prefilled tokens, pairs with the tokens before them.
    pub prefill_pairs: f64,
    /// Sequences that decode.
    pub decodes: f64,
    /// Tokens before the ones that they decode.
    pub decode_context: f64,
}

impl Batch {
    /// Adds `tokens` tokens of one prompt behind `context` others.
    pub fn prefill(&mut self, tokens: f64, context: f64) {
        self.tokens += tokens;
        self.prefill_pairs += tokens * (context + tokens / 2.0);
    }

    /// Adds one sequence that decodes a token behind `context` others.
    pub fn decode(&mut self, context: f64) {
        self.tokens += 1.0;
        self.decodes += 1.0;
        self.decode_context += context;
    }
}

/// Coefficients of one model on one device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatencyModel {
    /// Name for reports.
    pub name: &'static str,
    /// Fixed cost of a prefill, seconds.
    pub prefill_base_s: f64,
    /// Seconds per uncached prompt token.
    pub prefill_s_per_token: f64,
    /// Seconds per (uncached token x earlier token).
    pub prefill_s_per_token_pair: f64,
    /// Of a step: seconds that no tokens cost (launches, sampling, scheduling).
    pub step_base_s: f64,
    /// Of a step: seconds to read the weights once.
    pub weights_s: f64,
    /// Of a step: seconds per decoding sequence.
    pub step_s_per_sequence: f64,
    /// Of a step: seconds per token whose KV a decoding sequence reads.
    pub step_s_per_kv_token: f64,
    /// Seconds per decoded token.
    pub decode_s_per_token: f64,
    /// KV bytes per token over all layers.
    pub kv_bytes_per_token: f64,
    /// Host-to-device bandwidth, bytes per second.
    pub host_bytes_per_s: f64,
}

impl LatencyModel {
    /// Llama-3.1-8B in bf16 on one H100 SXM.
    ///
    /// Derived from public specifications: 8.03e9 parameters give 16.1 GFLOP per token; 32 layers of 32 heads of
    /// dimension 128 give 4 x 32 x 4096 = 524 kFLOP per token pair; the device peaks at 989 TFLOP/s (dense bf16,
    /// data sheet), of which prefill reaches about 55 %. Decoding reads 16.1 GB of weights per step at 3.35 TB/s
    /// (data sheet), 4.8 ms at the roof; 7 ms is used for a moderately batched step. KV: 2 x 32 layers x 8 heads x
    /// 128 x 2 bytes = 131 kB per token. A step reads 15.0 GB (without the embedding) at 92 % of the roof, and 2 ms go to
    /// launches, sampling and scheduling, which makes 7 ms. The host link is PCIe 5.0 x16 at 25 GB/s effective for paged copies.
    pub const LLAMA_3_1_8B_H100: Self = Self {
        name: "llama-3.1-8b-h100",
        prefill_base_s: 0.012,
        prefill_s_per_token: 16.1e9 / (0.55 * 989e12),
        prefill_s_per_token_pair: 524e3 / (0.55 * 989e12),
        step_base_s: 0.002,
        weights_s: 15.0e9 / (0.92 * 3.35e12),
        step_s_per_sequence: 0.0,
        step_s_per_kv_token: 131_072.0 / (0.8 * 3.35e12),
        decode_s_per_token: 0.007,
        kv_bytes_per_token: 131_072.0,
        host_bytes_per_s: 25e9,
    };

    /// Llama-3.1-70B in bf16 on four H100 SXM (tensor parallel), by the same derivation: 70.6e9 parameters, 80
    /// layers of 64 heads, eight KV heads; 45 % of the peak of four devices.
    pub const LLAMA_3_1_70B_4XH100: Self = Self {
        name: "llama-3.1-70b-4xh100",
        prefill_base_s: 0.020,
        prefill_s_per_token: 141.2e9 / (0.45 * 4.0 * 989e12),
        prefill_s_per_token_pair: 2.62e6 / (0.45 * 4.0 * 989e12),
        step_base_s: 0.003,
        weights_s: 141.0e9 / (0.92 * 4.0 * 3.35e12),
        step_s_per_sequence: 0.0,
        step_s_per_kv_token: 327_680.0 / (0.8 * 4.0 * 3.35e12),
        decode_s_per_token: 0.016,
        kv_bytes_per_token: 327_680.0,
        host_bytes_per_s: 100e9,
    };

    /// Llama-2-70B in fp16 on two H100 SXM (tensor parallel), as Splitwise measured it with vLLM in 2023: the model of
    /// steps is checked against that table. Parameters, layers and heads are the model's (69.0e9, 80, 64); of the device's
    /// peaks, 49 % of the arithmetic of the matrices, 33 % of that of attention, 82 % of the bandwidth, and the costs of a
    /// step (12 ms) and of a decoding sequence (0.37 ms) are fitted to the table: see docs/simulator.md.
    pub const LLAMA_2_70B_2XH100: Self = Self {
        name: "llama-2-70b-2xh100",
        prefill_base_s: 0.012,
        prefill_s_per_token: 138.0e9 / (0.49 * 2.0 * 989e12),
        prefill_s_per_token_pair: 2.62e6 / (0.33 * 2.0 * 989e12),
        step_base_s: 0.012,
        weights_s: 138.0e9 / (0.82 * 2.0 * 3.35e12),
        step_s_per_sequence: 0.00037,
        step_s_per_kv_token: 327_680.0 / (0.82 * 2.0 * 3.35e12),
        decode_s_per_token: 0.037,
        kv_bytes_per_token: 327_680.0,
        host_bytes_per_s: 50e9,
    };

    /// The models that can be named on the command line.
    pub const ALL: [Self; 2] = [Self::LLAMA_3_1_8B_H100, Self::LLAMA_3_1_70B_4XH100];

    /// Seconds of prefill for `uncached` tokens behind `cached` ones.
    pub fn prefill_s(&self, uncached: f64, cached: f64) -> f64 {
        self.prefill_base_s
            + self.prefill_s_per_token * uncached
            + self.prefill_s_per_token_pair * uncached * (cached + uncached / 2.0)
    }

    /// Seconds to decode `tokens` tokens.
    pub fn decode_s(&self, tokens: f64) -> f64 {
        self.decode_s_per_token * tokens
    }

    /// Seconds of one step of continuous batching.
    ///
    /// The matrix work of all tokens of the step is one pass over the weights: reading them is the least it costs.
    /// Attention is computed for prefilled tokens and reads the KV of decoding sequences.
    pub fn step_s(&self, batch: &Batch) -> f64 {
        if batch.tokens == 0.0 {
            return 0.0;
        }
        self.step_base_s
            + self.weights_s.max(self.prefill_s_per_token * batch.tokens)
            + self.prefill_s_per_token_pair * batch.prefill_pairs
            + self.step_s_per_sequence * batch.decodes
            + self.step_s_per_kv_token * batch.decode_context
    }

    /// Seconds to load `tokens` tokens of KV from the host tier.
    pub fn load_s(&self, tokens: f64) -> f64 {
        self.kv_bytes_per_token * tokens / self.host_bytes_per_s
    }
}
