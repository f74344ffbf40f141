// The bulk-copy kernel's control flow on the host, against primitives that misbehave as much as the hardware may:
// a load destroys its slot the moment it is issued and delivers its data only when its barrier is waited for; a store
// reads its slot at the last moment that a wait allows. A slot reused too early, a wrong parity, a barrier waited for
// without a load, or a store never waited for thus shows as wrong bytes or as an error.
//
// Leaders share nothing but the table, so they run one after the other.
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#define KV_COPY_BULK_PRIMITIVES
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

struct Index { unsigned x; };
static Index threadIdx, blockIdx, gridDim;
unsigned char ring[1 << 20];

namespace {
struct Load { std::uint32_t slot, bytes; std::uint64_t source; };
struct Barrier { bool ready = false; unsigned parity = 0; std::uint32_t expected = 0; std::vector<Load> loads; };
struct Store { std::uint64_t destination; std::uint32_t slot, bytes; };
std::map<const void*, std::uint32_t> names;
std::vector<Barrier> state;
std::vector<Store> open_group;
std::deque<std::vector<Store>> groups;
std::string problem;

void fail(const char* what) { if (problem.empty()) problem = what; }

std::uint32_t shared_address(const void* pointer) {
    auto* byte = static_cast<const unsigned char*>(pointer);
    if (byte >= ring && byte < ring + sizeof ring) return static_cast<std::uint32_t>(byte - ring);
    auto [entry, fresh] = names.try_emplace(pointer, 0x80000000u + static_cast<std::uint32_t>(names.size()));
    if (fresh) state.emplace_back();
    return entry->second;
}
Barrier& barrier_at(std::uint32_t address) { return state.at(address - 0x80000000u); }
void barrier_init(std::uint32_t address) { barrier_at(address).ready = true; }
void barriers_publish() {}
void barrier_expect(std::uint32_t address, std::uint32_t bytes) {
    Barrier& barrier = barrier_at(address);
    if (!barrier.ready) fail("barrier used before it was initialised");
    if (barrier.expected) fail("barrier armed twice");
    barrier.expected = bytes;
}
void bulk_load(std::uint32_t slot, std::uint64_t source, std::uint32_t bytes, std::uint32_t address) {
    if (bytes % 16 || source % 16 || slot % 16) fail("misaligned load");
    std::memset(ring + slot, 0xDD, bytes);
    barrier_at(address).loads.push_back({slot, bytes, source});
}
void barrier_wait(std::uint32_t address, std::uint32_t parity) {
    Barrier& barrier = barrier_at(address);
    if (parity != barrier.parity) return fail("waits for a phase that is over: reads the slot before its load");
    std::uint32_t arrived = 0;
    for (const Load& load : barrier.loads) {
        std::memcpy(ring + load.slot, reinterpret_cast<const void*>(load.source), load.bytes);
        arrived += load.bytes;
    }
    if (arrived == 0 || arrived != barrier.expected) return fail("would hang: barrier never completes");
    barrier.loads.clear();
    barrier.expected = 0;
    barrier.parity ^= 1;
}
void bulk_store(std::uint64_t destination, std::uint32_t slot, std::uint32_t bytes) {
    if (bytes % 16 || destination % 16 || slot % 16) fail("misaligned store");
    open_group.push_back({destination, slot, bytes});
}
void stores_commit() { groups.push_back(std::move(open_group)); open_group.clear(); }
void wait_until(std::size_t left) {
    for (; groups.size() > left; groups.pop_front())
        for (const Store& store : groups.front()) std::memcpy(reinterpret_cast<void*>(store.destination), ring + store.slot, store.bytes);
}
void stores_read_but_one() { wait_until(1); }
void stores_done() { wait_until(0); }
}  // namespace

#include KERNEL

extern "C" const char* emulate(const long long* table, int pairs, int buffers, long long src_stride, long long dst_stride, unsigned grid) {
    problem.clear();
    gridDim.x = grid;
    for (unsigned cta = 0; cta < grid; ++cta)
        for (unsigned warp = 0; warp < WARPS; ++warp) {
            names.clear(), state.clear(), groups.clear(), open_group.clear();
            blockIdx.x = cta, threadIdx.x = 32 * warp;
            kv_copy_bulk(table, pairs, buffers, src_stride, dst_stride);
            if (!groups.empty() || !open_group.empty()) fail("kernel ends before its stores are done");
        }
    return problem.c_str();
}
