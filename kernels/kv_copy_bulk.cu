// Copy KV blocks between two pools through a shared-memory ring of bulk asynchronous copies. sm_90 and later.
//
// Layout: the table described in agentrt.kernels (pairs, source bases, destination bases, all int64). Block bytes, strides
//   and base addresses are multiples of 16: the unit of cp.async.bulk. The caller checks that once per plan.
// Grid:   persistent, one-dimensional; WARPS warps per CTA, of which one lane each works. Work items are (buffer, pair,
//   chunk of SLOT bytes), dealt out round-robin over all leaders of the grid.
// Shared: WARPS * RING slots of SLOT bytes (dynamic), e.g. 8 * 3 * 8 KiB = 192 KiB in flight per CTA, so that a few CTAs cover the
//   link's bandwidth times its round trip. Registers hold addresses only; no data passes through them.
// Bytes:  n_buffers * n_pairs * BLOCK read and as many written, plus 32 bytes of table per item.
//
// Each leader runs its own ring. In step k it waits for load k, starts store k, and then refills the slot of store k-1, once that
// store has finished *reading* shared memory. So RING - 1 loads are in flight while one store drains, and leaders of
// other warps hide the latency of the table reads.
//
// Compiled with NVRTC at first use (no headers, no compiler on the user's machine) and cached on disk as a cubin.

#ifndef BLOCK  // bytes of one block
#define BLOCK 32768
#endif
#ifndef SLOT
#define SLOT 8192
#endif
#ifndef RING
#define RING 3
#endif
#ifndef WARPS
#define WARPS 8
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

// A test on the host brings primitives of its own, which misbehave as much as these are allowed to.
#ifndef KV_COPY_BULK_PRIMITIVES
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

__device__ __forceinline__ void bulk_load(u32 slot, u64 source, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(slot), "l"(source),
        "r"(bytes), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void bulk_store(u64 destination, u32 slot, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(slot), "r"(bytes)
                 : "memory");
}

// The barriers are initialised by this thread and used by the asynchronous proxy.
__device__ __forceinline__ void barriers_publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all groups but the newest have finished reading shared memory.
__device__ __forceinline__ void stores_read_but_one() { asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory"); }

// Until all groups are performed, not only read: the kernel's end then publishes them to whoever waits for its event.
__device__ __forceinline__ void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

#endif  // KV_COPY_BULK_PRIMITIVES

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    kv_copy_bulk(const long long* table, int n_pairs, int n_buffers, long long src_stride, long long dst_stride) {
    static_assert(BLOCK % 16 == 0 && SLOT % 128 == 0 && RING >= 2 && RING <= 32, "sizes that cp.async.bulk takes");
    extern __shared__ __align__(128) unsigned char ring[];
    __shared__ __align__(8) u64 barriers[WARPS][RING];
    __shared__ u64 destinations[WARPS][RING];
    __shared__ u32 sizes[WARPS][RING];
    if (threadIdx.x % 32 != 0) return;
    const u32 warp = threadIdx.x / 32;
    for (u32 s = 0; s < RING; ++s) barrier_init(shared_address(&barriers[warp][s]));
    barriers_publish();

    const u32 chunks = (BLOCK + SLOT - 1) / SLOT;
    const u64 items = (u64)n_pairs * n_buffers * chunks;
    const u64 leaders = (u64)gridDim.x * WARPS;
    // Neighbouring items go to different CTAs first, so that a short list still uses every CTA.
    const u64 leader = (u64)warp * gridDim.x + blockIdx.x;
    const u64 mine = leader < items ? (items - leader + leaders - 1) / leaders : 0;
    const long long* src_bases = table + 2 * (u64)n_pairs;
    const long long* dst_bases = src_bases + n_buffers;
    const u32 slots = shared_address(ring) + warp * RING * SLOT;
    u32 parity = 0;  // bit s: parity that the next load of slot s completes

    auto load = [&](u64 k) {
        const u64 item = leader + k * leaders;
        const u32 s = (u32)(k % RING);
        const u32 chunk = (u32)(item % chunks);
        const u64 rest = item / chunks;
        const u64 pair = rest % n_pairs;
        const u64 buffer = rest / n_pairs;
        const long long from = table[2 * pair];
        const long long to = table[2 * pair + 1];
        if (from < 0 || to < 0) {
            sizes[warp][s] = 0;
            return;
        }
        const u32 left = BLOCK - chunk * SLOT;
        const u32 bytes = left < SLOT ? left : SLOT;
        sizes[warp][s] = bytes;
        destinations[warp][s] = (u64)(dst_bases[buffer] + to * dst_stride) + (u64)chunk * SLOT;
        const u64 source = (u64)(src_bases[buffer] + from * src_stride) + (u64)chunk * SLOT;
        const u32 barrier = shared_address(&barriers[warp][s]);
        barrier_expect(barrier, bytes);
        bulk_load(slots + s * SLOT, source, bytes, barrier);
    };

    for (u64 k = 0; k + 1 < RING && k < mine; ++k) load(k);
    for (u64 k = 0; k < mine; ++k) {
        const u32 s = (u32)(k % RING);
        const u32 bytes = sizes[warp][s];
        if (bytes != 0) {
            barrier_wait(shared_address(&barriers[warp][s]), (parity >> s) & 1);
            parity ^= 1u << s;
            bulk_store(destinations[warp][s], slots + s * SLOT, bytes);
        }
        stores_commit();
        if (k + RING - 1 < mine) {
            // At most the store of this step may still read shared memory: the slot of the step before is free.
            stores_read_but_one();
            load(k + RING - 1);
        }
    }
    stores_done();
}
