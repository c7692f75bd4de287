// What Swagger UI's script brings.
interface Window {
  SwaggerUIBundle(options: object): void;
}
