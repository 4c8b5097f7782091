// Work dealt out to threads, and memory for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/parallel.h"

namespace mmfast {

// Blocks of memory kept from call to call, since a fresh page costs as much as computing several frames. One block serves
// one thread at a time. Threads that begin a task at the same moment all ask at the same moment: each waits for its turn, far
// less than the pages of a fresh block would take, and gets what it had last if that is free, which its cache may still hold.
// Of blocks over kLargest only kMostLent bytes are kept, and lent to the system, which takes their pages where it is short.
class Scratch {
public:
    static constexpr size_t kLargest = size_t(4) << 20, kMostLent = size_t(64) << 20;
    Scratch() = default;
    explicit Scratch(size_t bytes) {
        Block spare;
        if (const auto lock = take_lock()) {
            auto& idle = blocks();
            // The smallest that is large enough: a large one given to a small request would be missed by the next large one.
            size_t best = idle.size(), worst = best;
            for (size_t i = 0; i < idle.size(); ++i) {
                if (idle[i].large() != (bytes > kLargest)) continue;
                worst = i;
                if (idle[i].size >= bytes && (best == idle.size() || idle[i].before(idle[best]))) best = i;
            }
            if (best < idle.size()) {
                block_ = idle[best];
                idle.erase(idle.begin() + best);
                return;
            }
            if (worst < idle.size()) {  // rather a larger one than one more
                spare = idle[worst];
                idle.erase(idle.begin() + worst);
            }
        }
        std::free(spare.data);
        // What is large is made of large pages where there are any: these are filled with zeros at the speed of memory, and
        // writing to one that was lent costs no more than to a small one.
        const size_t page = bytes > kLargest ? kLargePage : 4096;
        block_.size = (bytes + page - 1) / page * page;
        block_.data = std::aligned_alloc(page == kLargePage ? page : 64, block_.size);
        if (!block_.data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (page == kLargePage) madvise(block_.data, block_.size, MADV_HUGEPAGE);
#endif
    }
    Scratch(Scratch&& other) noexcept : block_(other.block_) { other.block_ = {}; }
    Scratch& operator=(Scratch&&) = delete;
    ~Scratch() {
        if (!block_.data) return;
        if (!block_.large() || lend())
            if (const auto lock = take_lock()) {
                size_t lent = 0;
                for (const Block& b : blocks()) lent += b.large() ? b.size : 0;
                if (!block_.large() || lent + block_.size <= kMostLent) {
                    block_.owner = me();
                    blocks().push_back(block_);
                    return;
                }
            }
        std::free(block_.data);
    }
    char* data() const { return static_cast<char*>(block_.data); }

private:
    static constexpr size_t kLargePage = size_t(2) << 20;
    struct Block {
        void* data = nullptr;
        size_t size = 0;
        const void* owner = nullptr;  // the thread that had it last
        bool large() const { return size > kLargest; }
        bool before(const Block& other) const {
            return size != other.size ? size < other.size : owner == me() && other.owner != me();
        }
    };
    static const void* me() {
        static thread_local const char here = 0;
        return &here;
    }
    // Pages that the system may take as long as nobody writes to them again; false where it knows no such pages.
    bool lend() const {
#if defined(__linux__) && defined(MADV_FREE)
        if (block_.size > kMostLent) return false;
        const uintptr_t from = reinterpret_cast<uintptr_t>(block_.data), first = (from + 4095) / 4096 * 4096;
        return madvise(reinterpret_cast<void*>(first), (from + block_.size - first) / 4096 * 4096, MADV_FREE) == 0;
#else
        return false;
#endif
    }
    // Nobody holds it for longer than it takes to look through a few blocks, but in the child of a fork() that came at a bad
    // moment it is held for ever. Never destroyed: threads may still return blocks while the process ends.
    static std::unique_lock<std::mutex> take_lock() {
        static auto* m = new std::mutex;
        std::unique_lock<std::mutex> lock(*m, std::try_to_lock);
        if (forked()) return lock;
        // A thread that sleeps is woken late: it asks a few times before.
        for (int i = 0; !lock && i < 100; ++i) {
            std::this_thread::yield();
            (void)lock.try_lock();
        }
        if (!lock) lock.lock();
        return lock;
    }
    static std::vector<Block>& blocks() {
        static auto* b = new std::vector<Block>;
        return *b;
    }
    Block block_;
};

// How indices are dealt out: to so many threads and so many neighbours at once, at most.
struct Dealing {
    int64_t threads = std::numeric_limits<int64_t>::max();
    int64_t run = 16;
    // Shorter runs towards the end: for long tasks that gain nothing from what neighbours have read.
    bool shrinks = false;
};

// The indices of one thread, in runs of neighbours that are dealt out as threads become free.
class Hand {
public:
    // With `threads` runs get shorter towards the end.
    Hand(std::atomic<int64_t>& dealt, int64_t n, int64_t run, int64_t threads = 0)
        : dealt_(dealt), n_(n), run_(run), threads_(threads) {}
    // The next one, or -1.
    int64_t take() {
        const int64_t i = ahead();
        if (i >= 0) ++at_;
        return i;
    }
    // What take() is going to return: no other thread gets it then.
    int64_t ahead() {
        if (at_ == end_) {
            int64_t run = run_;
            if (threads_) {
                const int64_t left = n_ - dealt_.load(std::memory_order_relaxed);
                run = std::clamp<int64_t>(left / (threads_ * 8), 1, run_);
            }
            at_ = std::min(n_, dealt_.fetch_add(run, std::memory_order_relaxed));
            end_ = std::min(n_, at_ + run);
        }
        return at_ < end_ ? at_ : -1;
    }

private:
    std::atomic<int64_t>& dealt_;
    const int64_t n_, run_, threads_;
    int64_t at_ = 0, end_ = 0;
};

// f(i, scratch) or f(i, scratch, hand) for i in [0, n), by as many threads as `cost` (nanoseconds each, roughly) makes worth
// waking, each of which has `bytes` of scratch. A thread gets its indices in ascending order.
template <class F>
void deal_out(int64_t n, double cost, size_t bytes, const F& f, const Dealing& how = {}) {
    constexpr double kWorthAThread = 30e3;
    const int64_t worth = int64_t(double(n) * cost / kWorthAThread);
    const int64_t threads = std::max<int64_t>(1, std::min({n, max_threads(), worth, how.threads}));
    const int64_t run = std::clamp<int64_t>(n / (threads * 8), 1, how.run);
    std::atomic<int64_t> dealt{0};
    parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        const Scratch scratch(bytes);
        Hand hand(dealt, n, run, how.shrinks ? threads : 0);
        for (int64_t i; (i = hand.take()) >= 0;)
            if constexpr (std::is_invocable_v<F, int64_t, char*, Hand&>) f(i, scratch.data(), hand);
            else f(i, scratch.data());
    });
}

// Lets tasks use what they share in the order of their indices, where deal_out() deals these out: a task waits for those before
// it alone that use what it uses, rather than for all of a round. No task waits for ever: of those that are under way the first
// waits for nothing.
class Turns {
public:
    explicit Turns(int64_t shared) : done_(new std::atomic<int>[size_t(shared)]()) {}
    // Waits until `before` tasks have used it. False where one has failed: it will not be used then.
    bool wait(int64_t i, int before) const {
        while (done_[i].load(std::memory_order_acquire) < before) {
            if (failed_.load(std::memory_order_relaxed)) return false;
            std::this_thread::yield();
        }
        return true;
    }
    void done(int64_t i) { done_[i].fetch_add(1, std::memory_order_release); }
    void fail() { failed_ = true; }

private:
    const std::unique_ptr<std::atomic<int>[]> done_;
    std::atomic<bool> failed_{false};
};

}  // namespace mmfast
