// How attention is cut into items, one for each (row of the pass, up to 8 query heads of one KV head, block
// of 256 positions), and how they are spread over the grid. What fetches keys and values ahead and what
// multiplies them agree by it.
#pragma once

#include "config.cuh"

// How many positions the rows of a layer have in sight, their own included; 0: all. Windows come in a few
// kinds, numbered as the layers come.
struct LayerWindows {
    int kinds = 0;
    int kind[NUM_LAYERS] = {}, of_kind[NUM_LAYERS] = {};

    constexpr LayerWindows() {
        constexpr int WINDOW[NUM_LAYERS] = {LAYER_WINDOWS};
        for (int layer = 0; layer < NUM_LAYERS; ++layer) {
            while (kind[layer] < kinds && of_kind[kind[layer]] != WINDOW[layer]) ++kind[layer];
            if (kind[layer] == kinds) of_kind[kinds++] = WINDOW[layer];
        }
    }
    __device__ int operator[](int layer) const { return of_kind[kind[layer]]; }
};
constexpr int WINDOW_KINDS = LayerWindows().kinds;
__constant__ LayerWindows WINDOWS = LayerWindows();

// What a row of the pass attends to.
struct Span {
    int first_row;    // of the pass's rows in this slot
    int fresh_from;   // its position: from here on K and V are in this pass's packets
    int first, last;  // visible positions, both included

    Span() = default;
    __device__ Span(const PassArgs& args, int row, int window) {
        first_row = row;
        while (first_row > 0 && args.rows[first_row - 1].slot == args.rows[row].slot) --first_row;
        fresh_from = args.rows[first_row].position;
        last = args.rows[row].position;
        first = window > 0 ? max_of(0, last - window + 1) : 0;
    }
    __device__ int first_split() const { return first / KV_BLOCK; }
    __device__ int splits() const { return last / KV_BLOCK - first / KV_BLOCK + 1; }
};

struct Item {
    int row;
    int first_head;  // of up to ITEM_HEADS query heads of one KV head
    int split;       // counted from the row's first one
    int begin,
        end;    // positions of the split that the row sees: begin <= p < end; none if the row has no split
    int fresh;  // the first of them whose K and V are in this pass's packets; end if none
    int fresh_row;  // the row of the pass at position `fresh`

    __device__ int kv_head() const { return first_head / HEADS_PER_KV; }
    __device__ int heads() const { return min_of(ITEM_HEADS, (kv_head() + 1) * HEADS_PER_KV - first_head); }
    __device__ int tile_begin(int warp) const { return begin / KV_BLOCK * KV_BLOCK + warp * KV_TILE; }
    // The tiles that the row sees any of: first_tile() <= tile < end_tile().
    __device__ int first_tile() const { return static_cast<uint32_t>(begin) % KV_BLOCK / KV_TILE; }
    __device__ int end_tile() const { return static_cast<uint32_t>(end - 1) % KV_BLOCK / KV_TILE + 1; }
    // How many positions of warp `warp`'s tile exist; 0 if the row sees none of them.
    __device__ int tile_positions(int warp) const {
        const int first = tile_begin(warp);
        return first < end && first + KV_TILE > begin ? min_of(KV_TILE, MAX_SEQ_LEN - first) : 0;
    }
    // In the cache, in bytes: the vector of position `p`.
    __device__ uint64_t cache_offset(const PassArgs& args, int layer, int p) const {
        const uint64_t slot = static_cast<uint64_t>(layer) * args.num_slots + args.rows[row].slot;
        return ((slot * NUM_KV_HEADS + kv_head()) * MAX_SEQ_LEN + p) * VECTOR_BYTES;
    }
};

// The rows of one slot. Their items take turns split by split: rows that read the same keys and values do so
// at about the same time.
struct SlotRows {
    int first, end;  // row first <= r < end
    int splits;      // of none of them more

    __device__ SlotRows(const PassArgs& args, int first_row, int window) : first(first_row), end(first + 1) {
        while (end < num_rows(args) && args.rows[end].slot == args.rows[first].slot) ++end;
        const int oldest = Span(args, first, window).first_split();
        splits = args.rows[end - 1].position / KV_BLOCK - oldest + 1;
    }
    __device__ int items() const { return (end - first) * splits * ITEM_GROUPS; }
};

// What the items of a pass follow from, for each kind of window: worked out once, asked for in every layer by
// whoever fetches keys and values and whoever multiplies them.
struct ItemTable {
    static constexpr int ENTRIES = WINDOW_KINDS * ROWS;
    static constexpr int NO_SLOT = 0x7fffffff;

    Span span[WINDOW_KINDS][ROWS];
    int before[WINDOW_KINDS][ROWS];  // items of earlier slots, at a slot's first row; NO_SLOT at other rows
    int rows[WINDOW_KINDS][ROWS];    // of the slot, there too
    int count[WINDOW_KINDS];         // of all items

    // By thread `entry` of ENTRIES; the block's next barrier shows it.
    __device__ void start(const PassArgs& args, int entry) {
        const int kind = entry / ROWS, own = entry % ROWS, window = WINDOWS.of_kind[kind];
        before[kind][own] = NO_SLOT;
        if (own < num_rows(args)) span[kind][own] = Span(args, own, window);
        int items = 0;
        for (int row = 0; row < num_rows(args);) {
            const SlotRows slot(args, row, window);
            if (row == own) before[kind][own] = items, rows[kind][own] = slot.end - row;
            items += slot.items();
            row = slot.end;
        }
        if (own == 0) count[kind] = items;
    }
};

// The items of one layer, slot by slot. A block takes first(), first() + gridDim.x, ...: another block begins
// in each layer, so that short contexts burden all blocks alike.
class ItemList {
  public:
    __device__ ItemList(const ItemTable& table, int layer)
        : table_(table), kind_(WINDOW_KINDS == 1 ? 0 : WINDOWS.kind[layer]), layer_(layer) {}

    // The absolute number of the row's first split, and how many it has.
    __device__ int first_split(int row) const { return table_.span[kind_][row].first_split(); }
    __device__ int splits(int row) const { return table_.span[kind_][row].splits(); }
    __device__ int count() const { return table_.count[kind_]; }
    __device__ int first() const {
        return static_cast<int>((blockIdx.x + static_cast<uint32_t>(layer_) * ITEM_GROUPS) % gridDim.x);
    }

    __device__ Item operator[](int index) const {
        int row = 0;  // the first of the item's slot
#pragma unroll
        for (int other = 1; other < ROWS; ++other) {
            if (index >= table_.before[kind_][other]) row = other;
        }
        index -= table_.before[kind_][row];
        const int group = index % ITEM_GROUPS, turn = index / ITEM_GROUPS;
        const int rows = ROWS == 1 ? 1 : table_.rows[kind_][row];
        Item item;
        item.row = row + turn % rows;
        item.first_head = group / HEAD_GROUPS * HEADS_PER_KV + group % HEAD_GROUPS * ITEM_HEADS;
        item.split = turn / rows;
        const Span span = table_.span[kind_][item.row];
        const int block = span.first_split() + item.split;
        item.begin = max_of(block * KV_BLOCK, span.first);
        item.end = min_of((block + 1) * KV_BLOCK, span.last + 1);
        item.fresh = min_of(item.end, max_of(item.begin, span.fresh_from));
        item.fresh_row = span.first_row + item.fresh - span.fresh_from;
        return item;
    }

  private:
    const ItemTable& table_;
    int kind_, layer_;
};
