/* The log: docs/reference/store-format.md says what is where, and why it survives.
 *
 * The page behind the head is always erased. When the head is full, that page becomes the head, what is alive in the
 * oldest page moves there, a mark says that all of it has, and the oldest page is erased.
 */
#include "mote_store.h"

#include <string.h>

enum { HEADER = 16, MAGIC = 0x4c54534d /* "MSTL" */, MARK = 255, BLOCK = 64, LEAST = 32 };

/* A record's header in flash, little-endian as in memory; its CRC is over the first 12 bytes and the data. */
typedef struct {
    uint8_t key, last; /* last: whether it is the value's last fragment */
    uint16_t index, size, unused;
    uint32_t version, crc;
} record_t;

typedef struct {
    uint32_t magic, sequence, unused, crc; /* over the first 12 bytes */
} page_t;

/* Whether a record is one that the caller looks for: 1, 0, or an error. */
typedef int (*visit_t)(const mote_store_t *s, void *context, uint32_t at, const record_t *record);

static uint32_t padded(const mote_store_t *s, uint32_t size)
{
    return (size + s->flash.unit - 1) / s->flash.unit * s->flash.unit;
}

static int read_at(const mote_store_t *s, uint32_t at, void *out, uint32_t size)
{
    return s->flash.read_at(s->flash.context, at, out, size);
}

static int is_blank(const mote_store_t *s, uint32_t page, uint32_t from)
{
    uint8_t block[BLOCK];
    for (uint32_t at = from; at < s->flash.page_size;) {
        uint32_t left = s->flash.page_size - at, size = left < BLOCK ? left : BLOCK;
        int error = read_at(s, page * s->flash.page_size + at, block, size);
        if (error != MOTE_OK) {
            return error;
        }
        for (uint32_t i = 0; i < size; i++) {
            if (block[i] != 0xff) {
                return 0;
            }
        }
        at += size;
    }
    return 1;
}

static int erase_unless_blank(const mote_store_t *s, uint32_t page)
{
    int blank = is_blank(s, page, 0);
    return blank == 0 ? s->flash.erase_page(s->flash.context, page) : blank < 0 ? blank : MOTE_OK;
}

/* The page's sequence number in *sequence: 1, 0 if it is no page of a log, or an error. */
static int read_page(const mote_store_t *s, uint32_t page, uint32_t *sequence)
{
    page_t header;
    int error = read_at(s, page * s->flash.page_size, &header, sizeof header);
    *sequence = header.sequence;
    return error != MOTE_OK ? error : header.magic == MAGIC && header.crc == mote_crc32(0, &header, 12);
}

static int write_page(mote_store_t *s, uint32_t page, uint32_t sequence)
{
    page_t header = {MAGIC, sequence, 0xffffffffu, 0};
    header.crc = mote_crc32(0, &header, 12);
    int error = s->flash.write_at(s->flash.context, page * s->flash.page_size, &header, sizeof header);
    s->head = page;
    s->end = HEADER;
    s->sequence = sequence;
    return error;
}

/* The record at this offset of a page: 1, 0 if nothing whole is there, or an error. */
static int read_record(const mote_store_t *s, uint32_t page, uint32_t offset, record_t *record)
{
    uint8_t block[BLOCK];
    uint32_t at = page * s->flash.page_size + offset;
    if (offset + HEADER > s->flash.page_size) {
        return 0;
    }
    int error = read_at(s, at, record, sizeof *record);
    if (error != MOTE_OK) {
        return error;
    }
    if (record->key == 0 || record->size > s->flash.page_size - offset - HEADER) {
        return 0;
    }
    uint32_t crc = mote_crc32(0, record, 12);
    for (uint32_t done = 0; done < record->size && error == MOTE_OK;) {
        uint32_t left = record->size - done, size = left < BLOCK ? left : BLOCK;
        error = read_at(s, at + HEADER + done, block, size);
        crc = mote_crc32(crc, block, size);
        done += size;
    }
    return error != MOTE_OK ? error : crc == record->crc;
}

/* Visits the records of a page; *end gets where they end. */
static int visit_page(const mote_store_t *s, uint32_t page, visit_t visit, void *context, uint32_t *end)
{
    record_t record;
    uint32_t offset = HEADER;
    int found;
    while ((found = read_record(s, page, offset, &record)) == 1) {
        int error = visit(s, context, page * s->flash.page_size + offset, &record);
        if (error < 0) {
            return error;
        }
        offset += HEADER + padded(s, record.size);
    }
    *end = offset;
    return found;
}

static int visit_all(const mote_store_t *s, visit_t visit, void *context)
{
    for (uint32_t page = 0; page < s->flash.pages; page++) {
        uint32_t sequence = 0, end = 0;
        int error = read_page(s, page, &sequence);
        if (error == 1) {
            error = visit_page(s, page, visit, context, &end);
        }
        if (error < 0) {
            return error;
        }
    }
    return MOTE_OK;
}

/* ----------------------------------------------------------------------------------------------------- look-ups */

typedef struct {
    uint32_t key, version, last; /* the newest version whose last fragment is there, and that one's number */
} newest_t;

static int find_newest(const mote_store_t *s, void *context, uint32_t at, const record_t *record)
{
    newest_t *n = context;
    (void)s;
    (void)at;
    if (record->key == n->key && record->last && record->version > n->version) {
        n->version = record->version;
        n->last = record->index;
    }
    return 0;
}

static int newest_of(const mote_store_t *s, uint32_t key, newest_t *n)
{
    memset(n, 0, sizeof *n);
    n->key = key;
    return visit_all(s, find_newest, n);
}

typedef struct {
    uint32_t key, version, index;
    uint32_t not_in; /* a page that does not count, or UINT32_MAX */
    uint32_t at, size;
    int found;
} fragment_t;

static int find_fragment(const mote_store_t *s, void *context, uint32_t at, const record_t *record)
{
    fragment_t *f = context;
    if (record->key == f->key && record->version == f->version && record->index == f->index &&
        at / s->flash.page_size != f->not_in) {
        f->at = at + HEADER;
        f->size = record->size;
        f->found = 1;
    }
    return 0;
}

int mote_store_get(const mote_store_t *s, uint32_t key, void *out, size_t capacity)
{
    newest_t newest;
    size_t size = 0;
    int error = newest_of(s, key, &newest);
    if (error != MOTE_OK || newest.version == 0) {
        return error;
    }
    for (uint32_t i = 0; i <= newest.last; i++) {
        fragment_t f = {key, newest.version, i, UINT32_MAX, 0, 0, 0};
        error = visit_all(s, find_fragment, &f);
        if (error == MOTE_OK && (!f.found || f.size > capacity - size)) {
            error = MOTE_ERR_STORE;
        }
        if (error == MOTE_OK) {
            error = read_at(s, f.at, (uint8_t *)out + size, f.size);
        }
        if (error != MOTE_OK) {
            return error;
        }
        size += f.size;
    }
    return (int)size;
}

/* ------------------------------------------------------------------------------------------------------ writing */

/* Appends a record of data in memory, or, with data NULL, in flash at `from`. It fits the head. */
static int append(mote_store_t *s, record_t *record, const uint8_t *data, uint32_t from)
{
    uint8_t block[BLOCK];
    uint32_t at = s->head * s->flash.page_size + s->end;
    record->unused = 0xffff;
    uint32_t crc = mote_crc32(0, record, 12);
    int error = s->end + HEADER + padded(s, record->size) <= s->flash.page_size ? MOTE_OK : MOTE_ERR_STORE;
    for (uint32_t pass = 0; pass < 2; pass++) { /* the CRC stands in front of the data */
        if (pass == 1 && error == MOTE_OK) {
            record->crc = crc;
            error = s->flash.write_at(s->flash.context, at, record, HEADER);
        }
        for (uint32_t done = 0; done < record->size && error == MOTE_OK; done += BLOCK) {
            uint32_t left = record->size - done, size = left < BLOCK ? left : BLOCK;
            memset(block, 0xff, sizeof block);
            if (data != NULL) {
                memcpy(block, data + done, size);
            } else {
                error = read_at(s, from + done, block, size);
            }
            if (error == MOTE_OK && pass == 0) {
                crc = mote_crc32(crc, block, size);
            } else if (error == MOTE_OK) {
                error = s->flash.write_at(s->flash.context, at + HEADER + done, block, padded(s, size));
            }
        }
    }
    s->end += HEADER + padded(s, record->size);
    return error;
}

/* Moves a record of the oldest page to the head if it is alive and not there already. */
static int move(const mote_store_t *s, void *context, uint32_t at, const record_t *record)
{
    mote_store_t *to = context;
    newest_t newest;
    record_t copy = *record;
    fragment_t elsewhere = {record->key, record->version, record->index, at / s->flash.page_size, 0, 0, 0};
    if (record->key == MARK) {
        return 0;
    }
    int error = newest_of(s, record->key, &newest);
    /* One that says that there is no value has done its part: no older one is left, but in this page. */
    int alive = record->version == newest.version ? record->size > 0 : record->version == s->writing;
    if (error == MOTE_OK && alive) {
        error = visit_all(s, find_fragment, &elsewhere);
    }
    return error != MOTE_OK || !alive || elsewhere.found ? error : append(to, &copy, NULL, at + HEADER);
}

static int write_mark(mote_store_t *s)
{
    record_t mark = {MARK, 1, 0, 0, 0, 0, 0};
    return append(s, &mark, NULL, 0);
}

/* The next page becomes the head, and the one behind it is erased once nothing alive is left in it. */
static int advance(mote_store_t *s)
{
    uint32_t sequence = 0, end = 0;
    int error = write_page(s, (s->head + 1) % s->flash.pages, s->sequence + 1);
    uint32_t oldest = (s->head + 1) % s->flash.pages;
    int is_log = error == MOTE_OK ? read_page(s, oldest, &sequence) : error;
    if (is_log == 1) {
        error = visit_page(s, oldest, move, s, &end);
        error = error < 0 ? error : write_mark(s);
    } else {
        error = is_log;
    }
    return error < 0 ? error : erase_unless_blank(s, oldest);
}

/* Whether a record with so much data fits the head, and a mark behind it, which always finds room. */
static int fits(const mote_store_t *s, uint32_t size)
{
    return s->end + 2 * HEADER + padded(s, size) <= s->flash.page_size;
}

static uint32_t room(const mote_store_t *s)
{
    return (s->flash.page_size - s->end - 2 * HEADER) / s->flash.unit * s->flash.unit;
}

int mote_store_set(mote_store_t *s, uint32_t key, const void *data, size_t size)
{
    const uint8_t *from = data;
    uint32_t advances = 0;
    int error = MOTE_OK;
    record_t record = {(uint8_t)key, 0, 0, 0, 0, s->version + 1, 0};
    if (key == 0 || key >= MARK) {
        return MOTE_ERR_ARGUMENT;
    }
    if (size > mote_store_capacity(&s->flash) || s->version == UINT32_MAX) {
        return MOTE_ERR_STORE;
    }
    s->version++;
    s->writing = s->version;
    do {
        while (error == MOTE_OK && !fits(s, (uint32_t)(size < LEAST ? size : LEAST))) {
            error = advances++ <= s->flash.pages ? advance(s) : MOTE_ERR_STORE;
        }
        if (error == MOTE_OK) {
            record.size = (uint16_t)(size < room(s) ? size : room(s));
            record.last = size == record.size;
            error = append(s, &record, from, 0);
        }
        record.index++;
        size -= record.size;
        from = from != NULL ? from + record.size : NULL;
    } while (error == MOTE_OK && !record.last);
    s->writing = 0;
    return error;
}

/* ------------------------------------------------------------------------------------------------------ opening */

static int find_version(const mote_store_t *s, void *context, uint32_t at, const record_t *record)
{
    uint32_t *version = context;
    (void)s;
    (void)at;
    if (record->key != MARK && record->version > *version) {
        *version = record->version;
    }
    return 0;
}

static int find_mark(const mote_store_t *s, void *context, uint32_t at, const record_t *record)
{
    int *found = context;
    (void)s;
    (void)at;
    *found |= record->key == MARK;
    return 0;
}

/* The page with the highest number becomes the head: 1, 0 if there is no log, or an error. */
static int find_head(mote_store_t *s)
{
    int any = 0;
    for (uint32_t page = 0; page < s->flash.pages; page++) {
        uint32_t sequence = 0;
        int found = read_page(s, page, &sequence);
        if (found < 0) {
            return found;
        }
        if (found && (!any || sequence > s->sequence)) {
            s->head = page;
            s->sequence = sequence;
            any = 1;
        }
    }
    return any;
}

static int find_end(mote_store_t *s)
{
    uint32_t version = 0;
    int error = visit_page(s, s->head, find_version, &version, &s->end);
    int blank = error < 0 ? error : is_blank(s, s->head, s->end < s->flash.page_size ? s->end : s->flash.page_size);
    if (blank == 0) { /* a record that was cut: nothing more goes into this page */
        s->end = s->flash.page_size;
    }
    return blank < 0 ? blank : MOTE_OK;
}

/* A power cut in `advance` leaves the oldest page. With the mark all that is alive has moved. Without it the head holds
 * nothing but copies, and it is done again. */
static int finish_advance(mote_store_t *s)
{
    uint32_t sequence = 0, end = 0, oldest = (s->head + 1) % s->flash.pages;
    int moved = 0, is_log = read_page(s, oldest, &sequence);
    if (is_log == 1) {
        int error = visit_page(s, s->head, find_mark, &moved, &end);
        if (error < 0) {
            return error;
        }
        if (!moved) {
            error = s->flash.erase_page(s->flash.context, s->head);
            if (error == MOTE_OK) {
                s->sequence = 0;
                error = find_head(s);
            }
            return error < 0 ? error : MOTE_OK;
        }
    }
    return is_log < 0 ? is_log : erase_unless_blank(s, oldest);
}

static int is_geometry(const mote_flash_t *f)
{
    int unit = f->unit == 1 || f->unit == 2 || f->unit == 4 || f->unit == 8 || f->unit == 16;
    return f->read_at != NULL && f->write_at != NULL && f->erase_page != NULL && unit && f->page_size >= 128 &&
           f->page_size <= 65536 && f->page_size % f->unit == 0 && f->pages >= 3 &&
           f->pages <= 0x7fffffffu / f->page_size;
}

int mote_store_open(mote_store_t *s, const mote_flash_t *flash)
{
    memset(s, 0, sizeof *s);
    if (!is_geometry(flash)) {
        return MOTE_ERR_ARGUMENT;
    }
    s->flash = *flash;
    int error = find_head(s);
    if (error == 1) {
        error = finish_advance(s);
    } else if (error == 0) {
        for (uint32_t page = 0; page < flash->pages && error == MOTE_OK; page++) {
            error = erase_unless_blank(s, page);
        }
        error = error != MOTE_OK ? error : write_page(s, 0, 1);
    }
    if (error == MOTE_OK) {
        error = find_end(s);
    }
    return error != MOTE_OK ? error : visit_all(s, find_version, &s->version);
}

uint32_t mote_store_capacity(const mote_flash_t *flash)
{
    uint32_t lost = 3 * HEADER + 32 + flash->unit; /* of a page: its header, a mark, and what is too small to be used */
    return is_geometry(flash) ? (flash->pages - 2) * (flash->page_size - lost) : 0;
}

static int keep_get(void *context, uint32_t key, void *out, size_t capacity)
{
    int size = mote_store_get(context, key, out, capacity);
    return size == MOTE_ERR_STORE ? 0 : size;
}

static int keep_set(void *context, uint32_t key, const void *data, size_t size)
{
    return mote_store_set(context, key, data, size);
}

mote_keep_t mote_store_keep(mote_store_t *s)
{
    mote_keep_t keep = {s, keep_get, keep_set};
    return keep;
}
