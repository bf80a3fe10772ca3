for (const button of document.querySelectorAll("button.copy")) {
  const box = button.closest(".csv"), text = box.querySelector("pre"), told = box.querySelector("[role=status]");
  button.hidden = false;
  button.addEventListener("click", async () => {
    let copied = false;
    try {
      await navigator.clipboard.writeText(text.textContent);
      copied = true;
    } catch {
      box.querySelector("details").open = true;
      getSelection().selectAllChildren(text);
      copied = document.execCommand("copy");
    }
    told.textContent = copied ? "Copied" : "Selected: copy it with the keyboard";
  });
}
