/* A pretend accelerator: a TFLite external delegate whose device is a file.
 *
 * It takes over one operator, the QUANTIZE from uint8 to int8 at the start of an integer model
 * (models/factory/model.int8.tflite has it), computes it as the CPU would, and fails while its
 * device is gone. So the model runs through it with the same results, and everything that can
 * happen to an accelerator can be had by a file.
 *
 * FAKE_DEVICE (option or environment) names that file. Faults are asked for in the environment, or,
 * at any time, by the content of the file, as lines of NAME=VALUE:
 *   FAKE_CRASH   create | invoke | frame   SIGSEGV; `frame`: on a picture with a magenta corner
 *   FAKE_HANG    create | invoke | frame   stays in the native call while the device says so
 *   FAKE_SLOW_MS milliseconds              added to each inference
 *   FAKE_BLIND   1                         the model sees black
 *   FAKE_LEAK_MB megabytes                 taken at each inference and never given back
 *   FAKE_AFTER   inferences                that go well before any of these happens
 *
 * The structures below are those of TFLite's C interface (TfLiteDelegate, TfLiteContext and what
 * they lead to), as far as they are needed; members that are only passed over are `void *`.
 */
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, ERROR = 1 };
enum { TYPE_UINT8 = 3, TYPE_INT8 = 9 };
enum { BUILTIN_QUANTIZE = 114, BUILTIN_DELEGATE = 51 };
enum { FLAG_ALLOW_DYNAMIC_TENSORS = 1 }; /* else the CPU's own delegate is kept from the rest */

typedef struct {
    int size;
    int data[];
} IntArray;

typedef struct {
    int type;
    void *data;
    IntArray *dims;
    float scale;
    int32_t zero_point;
    int allocation_type;
    size_t bytes;
    const void *allocation;
    const char *name;
    void *delegate;
    int buffer_handle;
    bool data_is_stale, is_variable;
    int quantization_type;
    void *quantization, *sparsity;
    const void *dims_signature;
} Tensor;

typedef struct {
    IntArray *inputs, *outputs, *intermediates, *temporaries;
    void *user_data; /* what the kernel's `init` gave; and more */
} Node;

typedef struct Context Context;
typedef struct Delegate Delegate;

typedef struct {
    void *(*init)(Context *, const char *, size_t);
    void (*free)(Context *, void *);
    int (*prepare)(Context *, Node *);
    int (*invoke)(Context *, Node *);
    void *profiling_string;
    int32_t builtin_code;
    const char *custom_name;
    int version;
    void *external, *async_kernel;
    uint64_t inplace_operator;
} Registration;

struct Context {
    size_t tensors_size;
    int (*get_execution_plan)(Context *, IntArray **);
    Tensor *tensors;
    void *impl, *resize_tensor;
    void (*report_error)(Context *, const char *, ...);
    void *add_tensors;
    int (*get_node_and_registration)(Context *, int, Node **, Registration **);
    int (*replace_nodes)(Context *, Registration, const IntArray *, Delegate *); /* and more */
};

struct Delegate {
    void *data;
    int (*prepare)(Context *, Delegate *);
    void *copy_from_buffer, *copy_to_buffer, *free_buffer;
    int64_t flags;
    void *opaque_builder;
};

/* What a delegate and its kernel know; the kernel's `init` gets it from the delegate. */
typedef struct {
    char device[512];
    char faults[512]; /* content of the device */
    long inferences;
} Device;

static bool present(Device *device) {
    FILE *file = fopen(device->device, "r");
    if (file == NULL) return false;
    size_t size = fread(device->faults, 1, sizeof device->faults - 1, file);
    device->faults[size] = '\0';
    fclose(file);
    return true;
}

/* The value of a name, from the device's content or else the environment; "" if it has none. */
static const char *value(const Device *device, const char *name, char *into, size_t size) {
    const char *found = strstr(device->faults, name);
    const char *from = found ? found + strlen(name) + 1 : getenv(name);
    snprintf(into, size, "%.*s", from ? (int)strcspn(from, "\n") : 0, from ? from : "");
    return into;
}

static bool asked(const Device *device, const char *name, const char *what) {
    char text[32];
    return strcmp(value(device, name, text, sizeof text), what) == 0;
}

static void sleep_ms(long ms) {
    nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL);
}

static void fault(Device *device, const char *what) {
    if (asked(device, "FAKE_CRASH", what)) raise(SIGSEGV);
    while (asked(device, "FAKE_HANG", what) && present(device)) sleep_ms(20);
}

static bool magenta(const uint8_t *pixel) {
    return pixel[0] > 200 && pixel[1] < 60 && pixel[2] > 200;
}

static void *kernel_init(Context *context, const char *params, size_t length) {
    (void)context, (void)length;
    return (*(Delegate *const *)params)->data; /* first member of TfLiteDelegateParams */
}

static int kernel_invoke(Context *context, Node *node) {
    Device *device = node->user_data;
    const Tensor *input = &context->tensors[node->inputs->data[0]];
    Tensor *output = &context->tensors[node->outputs->data[0]];
    const uint8_t *from = input->data;
    int8_t *to = output->data;
    char text[32];

    if (!present(device)) {
        context->report_error(context, "fake device %s is gone\n", device->device);
        return ERROR;
    }
    for (size_t i = 0; i < input->bytes; i++) to[i] = (int8_t)(from[i] ^ 0x80);
    if (device->inferences++ < atol(value(device, "FAKE_AFTER", text, sizeof text))) return OK;

    fault(device, "invoke");
    if (magenta(from)) fault(device, "frame");
    if (asked(device, "FAKE_BLIND", "1")) memset(to, -128, output->bytes);
    sleep_ms(atol(value(device, "FAKE_SLOW_MS", text, sizeof text)));
    size_t leak = (size_t)atol(value(device, "FAKE_LEAK_MB", text, sizeof text)) << 20;
    if (leak) memset(malloc(leak), 1, leak); /* and never freed */
    return OK;
}

static int prepare(Context *context, Delegate *delegate) {
    IntArray *plan;
    if (context->get_execution_plan(context, &plan) != OK) return ERROR;
    for (int place = 0; place < plan->size; place++) {
        Node *node;
        Registration *operator;
        int number = plan->data[place];
        if (context->get_node_and_registration(context, number, &node, &operator) != OK)
            return ERROR;
        if (operator->builtin_code != BUILTIN_QUANTIZE) continue;
        const Tensor *input = &context->tensors[node->inputs->data[0]];
        const Tensor *output = &context->tensors[node->outputs->data[0]];
        if (input->type != TYPE_UINT8 || output->type != TYPE_INT8 ||
            input->scale != output->scale || input->zero_point - output->zero_point != 128)
            continue; /* more than a change of sign */
        Registration kernel = {
            .init = kernel_init,
            .invoke = kernel_invoke,
            .builtin_code = BUILTIN_DELEGATE,
            .custom_name = "FakeDelegate",
            .version = 1,
        };
        IntArray *nodes = malloc(sizeof(IntArray) + sizeof(int));
        nodes->size = 1;
        nodes->data[0] = number;
        int status = context->replace_nodes(context, kernel, nodes, delegate);
        free(nodes);
        return status;
    }
    context->report_error(context, "the fake device has no use for this model");
    return ERROR;
}

Delegate *tflite_plugin_create_delegate(const char *const *keys, const char *const *values,
                                        size_t options, void (*report_error)(const char *)) {
    const char *path = getenv("FAKE_DEVICE");
    char text[600];
    for (size_t i = 0; i < options; i++)
        if (strcmp(keys[i], "FAKE_DEVICE") == 0) path = values[i];
    Device *device = calloc(1, sizeof *device);
    snprintf(device->device, sizeof device->device, "%s", path ? path : "");
    if (!present(device)) {
        snprintf(text, sizeof text, "there is no device %s", device->device);
        report_error(text);
        free(device);
        return NULL;
    }
    fault(device, "create");
    Delegate *delegate = calloc(1, sizeof *delegate);
    delegate->data = device;
    delegate->prepare = prepare;
    delegate->flags = FLAG_ALLOW_DYNAMIC_TENSORS;
    return delegate;
}

void tflite_plugin_destroy_delegate(Delegate *delegate) {
    free(delegate->data);
    free(delegate);
}
