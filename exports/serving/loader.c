/* Loads a model that `polarmask export --serving` wrote and runs it on image files, by TensorFlow's C API alone: a session from
 * the SavedModel's tag "serve", fed and fetched by the tensor names of a signature, as TF Serving does it.
 *
 *   TF=$(python -c "import importlib.util as u; print(u.find_spec('tensorflow').submodule_search_locations[0])")
 *   gcc -std=c11 -O2 -Wall loader.c -o loader -I"$TF/include" -L"$TF" -Wl,-rpath,"$TF" \
 *       -l:libtensorflow_cc.so.2 -l:libtensorflow_framework.so.2
 *   ./loader exported/polarmask/1 photo.jpg other.png
 *
 * For each image a line "FILE: N detections", then a line a detection: class, score, ymin xmin ymax xmax, and the polygon's
 * x y x y ..., relative to the image, with as many digits as a float32 needs. The exit code is 1 if an image was refused (the
 * reason is on stderr, the other images are run all the same), 2 if the model cannot be loaded.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"
#include "tensorflow/c/tf_tstring.h"

static const char *OUTPUTS[] = {
    "num_detections", "detection_scores", "detection_classes", "detection_boxes", "detection_polygons",
};
enum { COUNT, SCORES, CLASSES, BOXES, POLYGONS, NUM_OUTPUTS };

static void fail(const char *what, const char *why) {
    fprintf(stderr, "error: %s: %s\n", what, why);
    exit(2);
}

/* The signatures' tensor names stand in the MetaGraphDef, a protocol buffer. A few lines of its wire format read them: a
 * message is a row of fields, each a tag (number and type) and a value, and only values with a length are of interest here. */
typedef struct {
    const uint8_t *at, *end;
} Bytes;

static uint64_t varint(Bytes *message) {
    uint64_t value = 0;
    for (int shift = 0; message->at < message->end && shift < 64; shift += 7) {
        uint8_t byte = *message->at++;
        value |= (uint64_t)(byte & 127) << shift;
        if (byte < 128) return value;
    }
    fail("saved_model.pb", "damaged");
    return 0;
}

/* The next field with a length, and its number; 0 at the end of the message. */
static int next_field(Bytes *message, Bytes *body) {
    while (message->at < message->end) {
        uint64_t tag = varint(message), length = 0;
        if ((tag & 7) == 0) varint(message);
        else length = (tag & 7) == 1 ? 8 : (tag & 7) == 5 ? 4 : varint(message);
        if (length > (uint64_t)(message->end - message->at)) fail("saved_model.pb", "damaged");
        *body = (Bytes){message->at, message->at + length};
        message->at += length;
        if ((tag & 7) == 2) return (int)(tag >> 3);
    }
    return 0;
}

/* The value of a field; of a map, whose entries hold a key (1) and a value (2), the value of this key. */
static Bytes get(Bytes message, int number, const char *key) {
    Bytes body;
    for (int found; (found = next_field(&message, &body));) {
        if (found != number) continue;
        if (!key) return body;
        Bytes name = get(body, 1, NULL);
        if ((size_t)(name.end - name.at) == strlen(key) && !memcmp(name.at, key, strlen(key))) return get(body, 2, NULL);
    }
    return (Bytes){NULL, NULL};
}

/* The graph's output that stands for an input (side 1) or output (side 2) of the signature. */
static TF_Output tensor_of(TF_Graph *graph, Bytes meta_graph, const char *signature, int side, const char *name) {
    Bytes text = get(get(get(meta_graph, 5, signature), side, name), 1, NULL); /* like StatefulPartitionedCall:3 */
    char operation[256];
    int index = 0;
    if (!text.at || text.end - text.at >= (long)sizeof operation) fail(name, "not in the signature serving_default");
    memcpy(operation, text.at, text.end - text.at);
    operation[text.end - text.at] = 0;
    char *colon = strrchr(operation, ':');
    if (colon) *colon = 0, index = atoi(colon + 1);
    TF_Output output = {TF_GraphOperationByName(graph, operation), index};
    if (!output.oper) fail(operation, "not in the graph");
    return output;
}

/* The file's bytes as a string tensor of shape [1], or NULL with errno set. */
static TF_Tensor *read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    size_t size = 0, room = 1 << 16, got;
    char *content = malloc(room);
    while (content && (got = fread(content + size, 1, room - size, file)) > 0) {
        size += got;
        if (size == room) content = realloc(content, room *= 2);
    }
    if (ferror(file) || !content) {
        fclose(file);
        free(content);
        return NULL;
    }
    fclose(file);
    int64_t shape[] = {1};
    TF_Tensor *tensor = TF_AllocateTensor(TF_STRING, shape, 1, sizeof(TF_TString));
    TF_TString *string = TF_TensorData(tensor);
    TF_StringInit(string);
    TF_StringCopy(string, content, size);
    free(content);
    return tensor;
}

static void print_detections(const char *path, TF_Tensor **outputs) {
    int count = *(int32_t *)TF_TensorData(outputs[COUNT]);
    int64_t numbers = 2 * TF_Dim(outputs[POLYGONS], 2);
    const float *scores = TF_TensorData(outputs[SCORES]), *boxes = TF_TensorData(outputs[BOXES]);
    const float *polygons = TF_TensorData(outputs[POLYGONS]);
    const int32_t *classes = TF_TensorData(outputs[CLASSES]);
    printf("%s: %d detections\n", path, count);
    for (int row = 0; row < count; row++) {
        printf("%" PRId32 " %.9g", classes[row], scores[row]);
        for (int i = 0; i < 4; i++) printf(" %.9g", boxes[4 * row + i]);
        for (int64_t i = 0; i < numbers; i++) printf(" %.9g", polygons[numbers * row + i]);
        printf("\n");
    }
}

int main(int argc, char **argv) {
    if (argc < 3) fail("usage", "loader MODEL_DIRECTORY/VERSION IMAGE [IMAGE ...]");
    TF_Status *status = TF_NewStatus();
    TF_Graph *graph = TF_NewGraph();
    TF_SessionOptions *options = TF_NewSessionOptions();
    TF_Buffer *buffer = TF_NewBuffer();
    const char *tags[] = {"serve"};
    TF_Session *session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, buffer, status);
    if (TF_GetCode(status) != TF_OK) fail(argv[1], TF_Message(status));
    Bytes meta_graph = {buffer->data, (const uint8_t *)buffer->data + buffer->length};
    TF_Output input = tensor_of(graph, meta_graph, "serving_default", 1, "image_bytes"), outputs[NUM_OUTPUTS];
    for (int i = 0; i < NUM_OUTPUTS; i++) outputs[i] = tensor_of(graph, meta_graph, "serving_default", 2, OUTPUTS[i]);

    int refused = 0;
    for (int i = 2; i < argc; i++) {
        TF_Tensor *content = read_file(argv[i]), *found[NUM_OUTPUTS];
        if (!content) {
            fprintf(stderr, "error: %s: %s\n", argv[i], strerror(errno));
            refused = 1;
            continue;
        }
        TF_SessionRun(session, NULL, &input, &content, 1, outputs, found, NUM_OUTPUTS, NULL, 0, NULL, status);
        TF_StringDealloc(TF_TensorData(content));
        TF_DeleteTensor(content);
        if (TF_GetCode(status) != TF_OK) { /* TensorFlow names nodes of the graph in further lines */
            const char *reason = TF_Message(status);
            fprintf(stderr, "error: %s: %.*s\n", argv[i], (int)strcspn(reason, "\n"), reason);
            refused = 1;
            continue;
        }
        print_detections(argv[i], found);
        for (int k = 0; k < NUM_OUTPUTS; k++) TF_DeleteTensor(found[k]);
    }
    TF_CloseSession(session, status);
    TF_DeleteSession(session, status);
    TF_DeleteBuffer(buffer);
    TF_DeleteSessionOptions(options);
    TF_DeleteGraph(graph);
    TF_DeleteStatus(status);
    return refused;
}
