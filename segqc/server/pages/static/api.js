"use strict";

const place = document.getElementById("api");
if (place) {
  window.SwaggerUIBundle({
    url: place.dataset.schema,
    domNode: place,
    deepLinking: true,
    docExpansion: "none",
    validatorUrl: null,
  });
}
